"""Metrics of a run: lines on stdout, a JSONL file, and TensorBoard if it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from lutjax.files import replace_file


class MetricsWriter:
    r"""Writes a record a step.

    After a kill the log may be ahead of the checkpoint that the run resumes from: records of later
    steps are dropped, so that every step is there once.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     with MetricsWriter(Path(directory), start=0, quiet=True) as writer:
    ...         writer.write({"step": 1, "loss": 2.5})
    ...     (Path(directory) / "metrics.jsonl").read_text()
    '{"step": 1, "loss": 2.5}\n'
    """

    def __init__(self, directory: Path, start: int, *, quiet: bool = False) -> None:
        """Opens the log.

        Args:
          directory: Holds `metrics.jsonl` and TensorBoard's files.
          start: Steps that the run has done already.
          quiet: Write nothing to stdout.
        """
        path = directory / "metrics.jsonl"
        if path.exists():
            keep_until(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(directory)
        self._quiet = quiet

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record; it has a `step` and numbers."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if not self._quiet:
            print(
                f"step {step}  " + "  ".join(f"{k} {v:.5g}" for k, v in numbers.items()), flush=True
            )

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The records of a run."""
    text = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def keep_until(path: Path, last: int) -> None:
    """Drops records of later steps, which a resumed run writes again, and a line cut short."""
    kept = [line + "\n" for line, record in whole_lines(path) if record["step"] <= last]
    replace_file(path, "".join(kept))


def whole_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The lines of a JSONL file and what they say, but one that a kill cut short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield line, record


def _tensorboard(directory: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))
