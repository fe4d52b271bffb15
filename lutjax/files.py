"""Files of text, files that are written at once, and JSON that people read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_by_line(header: Mapping[str, Any], name: str, entries: Mapping[str, Any]) -> str:
    """JSON to read and edit: the header and below `name` the entries, each on a line of its own.

    >>> print(json_by_line({"format": "f"}, "sizes", {"a": [1, 2], "b": [3]}))
    {"format": "f", "sizes": {
    "a": [1, 2],
    "b": [3]
    }}
    <BLANKLINE>
    """
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
    return f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {{\n{rows}\n}}}}\n"


def read_utf8(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it is not UTF-8; names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def replace_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file such that whoever reads it sees the old content or the new one, never a part.

    Args:
      path: The file; its directory must exist.
      content: Text, which is written as UTF-8, or bytes.

    Raises:
      OSError: If it cannot be written; what was there stays, and nothing is left behind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     replace_file(f"{directory}/a.txt", "old")
    ...     replace_file(f"{directory}/a.txt", "new")
    ...     [(file.name, file.read_text()) for file in Path(directory).iterdir()]
    [('a.txt', 'new')]
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
