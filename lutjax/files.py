"""Files that are written at once."""

from __future__ import annotations

import os
from pathlib import Path


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
