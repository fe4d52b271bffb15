"""Test-time training on few-shot tasks: ``python -m train.ttt --help``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

import lutjax
from lutjax.arrays import has_compressed
from lutjax.files import replace_file
from train.base_model import Start, load_start, prepare
from train.checkpoints import differences
from train.command_line import exit_code
from train.metrics import whole_lines
from train.solver import Answered, solve
from train.tasks import read_tasks
from train.ttt_config import TTTConfig


def load_base(config: TTTConfig) -> Start:
    """The model, its base, quantised if asked for, and the adapter that every task starts with.

    Raises:
      ValueError: If the model has no tokenizer, or does not fit the options.
    """
    start = load_start(config.model, config.dtype, remat=config.remat)
    if config.bits is not None and has_compressed(start.base):
        raise ValueError(f"{config.model} is compressed already; leave out bits={config.bits}")
    return prepare(
        start,
        "lora" if config.bits is None else "qlora",
        rank=config.rank,
        recipe=lutjax.Recipe.uniform(config.bits or 4, config.group_size),
        targets=config.targets,
        key=jax.random.key(config.seed),
        peft=config.adapter,
    )


def answer_tasks(config: TTTConfig, *, quiet: bool = False) -> list[Answered]:
    """Answers tasks, going on where an earlier run in the output directory stopped.

    The output directory gets ``run.json`` (the configuration), ``predictions.jsonl`` (a line for
    each task, see :class:`~train.solver.Answered`) and at the end ``summary.json``.

    Args:
      config: The run.
      quiet: Show no progress and print nothing.

    Returns:
      The results, in the order of the tasks.

    Raises:
      FileNotFoundError: If there is no model or no task.
      ValueError: For tasks or a model that cannot be used, and if the output directory is of
        another run.
    """
    tasks = read_tasks(config.tasks)[: config.limit]
    log = _Log(config)
    found = log.read()
    # A task that was changed is another one, and one without an answer may get one now.
    answered = {(r.name, r.fingerprint): r for r in found if r.skipped is None}
    done = {t.name: answered[key] for t in tasks if (key := (t.name, t.fingerprint)) in answered}
    left = [task for task in tasks if task.name not in done]
    start = load_base(config) if left else None
    again = {task.name for task in left}
    log.begin([result for result in found if result.name not in again])
    with tqdm(total=len(tasks), initial=len(done), unit="task", disable=quiet) as bar:
        for result in solve(config, start, left, progress=not quiet) if start else ():
            log.write(result)
            done[result.name] = result
            bar.set_postfix_str(summary_line(done.values()))
            bar.update()
            if result.skipped and not quiet:
                bar.write(f"{result.name}: no answer, {result.skipped}")
    results = [done[task.name] for task in tasks]
    replace_file(config.output / "summary.json", json.dumps(summary(results), indent=1) + "\n")
    if not quiet:
        print(summary_line(results))
    return results


def summary(results: Sequence[Answered]) -> dict[str, Any]:
    """How many of the queries with a known answer were answered right; without one, none is."""
    places = [place for result in results for place in result.right if place is not None]
    return {
        "tasks": len(results),
        "skipped": sum(result.skipped is not None for result in results),
        "queries": len(places),
        "right_at_first": sum(place == 0 for place in places),
        "right": sum(place >= 0 for place in places),
    }


def summary_line(results: Any) -> str:
    """The same, to read."""
    found = summary(list(results))
    without = f"; tasks without an answer: {found['skipped']}" if found["skipped"] else ""
    if not found["queries"]:
        return f"{found['tasks']} tasks without known answers{without}"
    return (
        f"{found['queries']} queries, {found['right_at_first'] / found['queries']:.1%} right at "
        f"the first attempt, {found['right'] / found['queries']:.1%} at all{without}"
    )


class _Log:
    """The results so far, and what they belong to."""

    def __init__(self, config: TTTConfig) -> None:
        self._directory = config.output
        self._lines = config.output / "predictions.jsonl"
        self._identity = _identity(config)

    def read(self) -> list[Answered]:
        """Results of earlier runs.

        Raises:
          ValueError: If they are of another configuration.
        """
        if not (self._directory / "run.json").exists():
            return []
        found = json.loads((self._directory / "run.json").read_text(encoding="utf-8"))
        if differing := differences(found, self._identity, "the output directory"):
            raise ValueError(
                f"{self._directory} is of another run: {differing}; use another directory"
            )
        if not self._lines.exists():
            return []
        return [_from_json(record) for _, record in whole_lines(self._lines)]

    def begin(self, kept: Sequence[Answered]) -> None:
        """Writes what is kept, so that new lines can follow."""
        self._directory.mkdir(parents=True, exist_ok=True)
        replace_file(self._lines, "".join(_line(result) for result in kept))
        replace_file(self._directory / "run.json", json.dumps(self._identity, indent=1) + "\n")

    def write(self, result: Answered) -> None:
        """Adds a result."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(_line(result))


def _identity(config: TTTConfig) -> dict[str, Any]:
    """What results depend on; not how many are computed at once."""
    fields = dataclasses.asdict(config)
    for name in ("output", "instances", "tokens_at_once", "sequence_length", "remat", "limit"):
        del fields[name]
    return json.loads(json.dumps(fields, default=str))


def _line(result: Answered) -> str:
    return json.dumps(dataclasses.asdict(result)) + "\n"


def _from_json(record: dict[str, Any]) -> Answered:
    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return Answered(**{name: freeze(value) for name, value in record.items()})


def main() -> int:
    """The command line; exit code 2 for bad input."""
    import tyro

    return exit_code(
        "train.ttt", lambda: answer_tasks(tyro.cli(TTTConfig, prog="python -m train.ttt"))
    )


if __name__ == "__main__":
    sys.exit(main())
