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

from lutjax.cli.demo import Demo
from lutjax.cli.evaluate import Eval
from lutjax.cli.generate import Generate
from lutjax.cli.inspect import Inspect
from lutjax.cli.quantize import Quantize

COMMANDS: dict[str, type] = {
    "quantize": Quantize,
    "eval": Eval,
    "generate": Generate,
    "inspect": Inspect,
    "demo": Demo,
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
    command = tyro.cli(
        _command_type(),
        prog="lutjax",
        description=_DESCRIPTION,
        args=arguments or ["--help"],
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )
    try:
        command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("lutjax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"lutjax: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _command_type() -> Any:
    parts = [
        Annotated[command, tyro.conf.subcommand(name, prefix_name=False)]
        for name, command in COMMANDS.items()
    ]
    return functools.reduce(operator.or_, parts)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
