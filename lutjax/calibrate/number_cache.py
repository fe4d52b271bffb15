"""Measured numbers on disk, so that a call that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NumberCache:
    """One JSON line for each number, under a hash of all that it depends on.

    Several processes may write to the same file, and a line that a kill left unfinished is skipped.
    An entry names the parameter in ``"path"`` and has a hash of what was measured in ``"weight"``;
    whatever else it holds are settings.
    """

    def __init__(self, path: str | os.PathLike | None):
        """Reads the file if it is there; nothing is kept for None."""
        self._path = None if path is None else Path(path)
        self._numbers: dict[str, float] = {}
        self._weights: dict[str, set[str]] = {}
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                name, parameter, weight = record["id"], record["path"], record["weight"]
                self._numbers[name] = float(record["value"])
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            self._weights.setdefault(parameter, set()).add(weight)

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raises ValueError if the file has numbers of other weights at this path."""
        path, weight = entry["path"], entry["weight"]
        if self._weights.get(path, {weight}) != {weight}:
            raise ValueError(
                f"the cache {self._path} was made from other weights: {path!r} differs; name "
                f"another file or delete it"
            )

    def get(self, entry: Mapping[str, Any]) -> float | None:
        """The number of an entry, None if it is not there."""
        return self._numbers.get(_identity(entry))

    def put(self, entry: Mapping[str, Any], value: float) -> None:
        """Appends a number."""
        if self._path is None:
            return
        record = {"id": _identity(entry), "path": entry["path"], "weight": entry["weight"]}
        # One write of a short line to a file opened for appending is not torn apart by other
        # writers; the newline in front ends what a killed one may have left.
        with open(self._path, "ab", buffering=0) as file:
            file.write(("\n" + json.dumps(record | {"value": value}) + "\n").encode())


def _identity(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
