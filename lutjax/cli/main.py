"""Parsing of the command line, and how errors end it.

Each subcommand is a frozen dataclass in a module of its own: its fields are the options, its
docstring the help, its `run` the work. A new one is a module and a line in `COMMANDS`. Modules
import the heavy libraries inside `run`, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from lutjax.cli.allocate import Allocate
from lutjax.cli.decompose import Decompose
from lutjax.cli.demo import Demo
from lutjax.cli.doctor import Doctor
from lutjax.cli.evaluate import Eval
from lutjax.cli.generate import Generate
from lutjax.cli.inspect import Inspect
from lutjax.cli.quantize import Quantize
from lutjax.cli.sparsify import Sparsify

COMMANDS: dict[str, type] = {
    "quantize": Quantize,
    "decompose": Decompose,
    "allocate": Allocate,
    "sparsify": Sparsify,
    "eval": Eval,
    "generate": Generate,
    "inspect": Inspect,
    "demo": Demo,
    "doctor": Doctor,
}

BAD_INPUT = 2
INTERRUPTED = 130

_DESCRIPTION = """Compressed language models in JAX.

MODEL is a directory with config.json and safetensors, a directory that `lutjax quantize` wrote, a
.gguf file, or the id of a model on the Hugging Face hub.

`lutjax COMMAND --help` shows a command's options and examples; `lutjax --version` the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words after `lutjax`; those of the process by default.

    Returns:
      The exit code: 0, 2 for bad input (also by `SystemExit`), 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        from lutjax import __version__

        print(f"lutjax {__version__}")
        return 0
    command = _parse(arguments)
    try:
        command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("lutjax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OverflowError, OSError, ImportError) as error:
        print(f"lutjax: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        return tyro.cli(COMMANDS[name], prog=f"lutjax {name}", args=rest, config=config)
    # Anything else is a call for the overview, or an error that names the commands.
    described = [
        Annotated[command, tyro.conf.subcommand(name, description=_summary(command))]
        for name, command in COMMANDS.items()
    ]
    overview: Any = functools.reduce(operator.or_, described)
    return tyro.cli(
        overview,
        prog="lutjax",
        description=_DESCRIPTION,
        args=arguments or ["--help"],
        config=config,
    )


def _summary(command: type) -> str:
    return (command.__doc__ or "").splitlines()[0]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
