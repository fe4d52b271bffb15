"""Few-shot tasks: a handful of pairs that show a rule, and inputs to apply it to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Grid = tuple[tuple[int, ...], ...]
"""Rows of cells, each 0 to 9."""

Value = str | Grid


def to_grid(rows: Iterable[Iterable[int]]) -> Grid:
    """Rows as a value that can be counted and compared."""
    return tuple(map(tuple, rows))


class Pair(NamedTuple):
    """An input and what the rule makes of it."""

    input: Value
    output: Value


class Query(NamedTuple):
    """An input to apply the rule to, and the right answer if it is known."""

    input: Value
    output: Value | None


class Task(NamedTuple):
    """A rule shown by examples.

    Attributes:
      name: Unique among the tasks of a run.
      demonstrations: At least two.
      queries: What to answer; the right answers are only compared with.
    """

    name: str
    demonstrations: tuple[Pair, ...]
    queries: tuple[Query, ...]

    @property
    def has_grids(self) -> bool:
        """Whether all that is shown is a grid, so that it can be turned and recoloured."""
        shown = [value for pair in self.demonstrations for value in pair]
        shown += [query.input for query in self.queries]
        return not any(isinstance(value, str) for value in shown)

    @property
    def fingerprint(self) -> str:
        """Hash of everything: a result is that of this very task."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read_tasks(path: str | Path) -> list[Task]:
    """Reads tasks in the format of ARC, with strings or grids as values.

    A task is ``{"train": [{"input", "output"}, ...], "test": [{"input", "output"?}, ...]}``.

    Args:
      path: A directory with one task in each .json file, or a .json file that maps names to tasks.

    Returns:
      The tasks, by name.

    Raises:
      FileNotFoundError: If nothing is there.
      ValueError: If a file or a task is not of the format; names it.

    Source: the Abstraction and Reasoning Corpus (arXiv 1911.01547).
    """
    path = Path(path)
    if path.is_dir():
        records = {file.stem: _read_json(file) for file in sorted(path.glob("*.json"))}
    else:
        found = _read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}; it must map names to tasks")
        records = {path.stem: found} if {"train", "test"} <= found.keys() else found
    if not records:
        raise ValueError(f"{path} has no task")
    return [_task(name, record, path) for name, record in sorted(records.items())]


def to_text(value: Value, separator: str = "") -> str:
    r"""A value as a model reads it: strings as they are, grids as lines of digits.

    >>> to_text(((1, 2), (3, 4)))
    '12\n34'
    """
    if isinstance(value, str):
        return value
    return "\n".join(separator.join(map(str, row)) for row in value)


def from_text(text: str, *, grid: bool) -> Value | None:
    r"""The value that a model has written; None for nothing, and for a grid that is none.

    >>> from_text("1 2\n3 4\n", grid=True)
    ((1, 2), (3, 4))
    >>> from_text("12\n3", grid=True) is None
    True
    """
    text = text.strip()
    if not grid:
        return text or None
    lines = ["".join(line.split()) for line in text.splitlines()]
    rows = to_grid(map(int, line) for line in lines if line.isascii() and line.isdigit())
    is_grid = rows and len(rows) == len(lines) and len({len(row) for row in rows}) == 1
    return rows if is_grid else None


def _read_json(path: Path) -> Any:
    def distinct(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{path} has {name!r} twice in one object; rename one")
        return dict(items)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _task(name: str, record: Any, path: Path) -> Task:
    where = f"task {name!r} of {path}"
    if not (isinstance(record, dict) and all(_is_list(record, key) for key in ("train", "test"))):
        raise ValueError(f"{where} needs the lists 'train' and 'test'")
    shown = [_query(pair, f"{where}, 'train'") for pair in record["train"]]
    demonstrations = tuple(Pair(q.input, q.output) for q in shown if q.output is not None)
    queries = tuple(_query(pair, f"{where}, 'test'") for pair in record["test"])
    if len(demonstrations) < max(2, len(shown)):
        raise ValueError(f"{where} needs two or more pairs in 'train', all with an output")
    if not queries:
        raise ValueError(f"{where} has nothing to answer in 'test'")
    known = [query.output for query in queries if query.output is not None]
    outputs = [*known, *(pair.output for pair in demonstrations)]
    if len({isinstance(output, str) for output in outputs}) > 1:
        raise ValueError(f"{where} has both strings and grids as outputs; use one of them")
    return Task(name, demonstrations, queries)


def _is_list(record: dict[str, Any], key: str) -> bool:
    return isinstance(record.get(key), list)


def _query(record: Any, where: str) -> Query:
    if not isinstance(record, dict) or "input" not in record:
        raise ValueError(f"{where}: a pair is {record!r:.80}; it needs an 'input'")
    output = record.get("output")
    return Query(_value(record["input"], where), None if output is None else _value(output, where))


def _value(value: Any, where: str) -> Value:
    if isinstance(value, str) and value.strip():
        return value.strip()
    rows = value if isinstance(value, list) else []
    is_grid = rows and all(
        isinstance(row, list)
        and row
        and len(row) == len(rows[0])
        and all(type(cell) is int and 0 <= cell <= 9 for cell in row)
        for row in rows
    )
    if not is_grid:
        raise ValueError(
            f"{where}: {value!r:.80} is neither text nor a rectangle of numbers from 0 to 9"
        )
    return to_grid(rows)
