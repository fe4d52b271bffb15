"""Output directories that appear and disappear as a whole."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_destination(destination: str | Path) -> Path:
    """Checks that a directory can be made at `destination`, without making it.

    Raises:
      FileExistsError: if something is there already.
      FileNotFoundError: if its parent directory is missing.
    """
    destination = Path(destination)
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists; remove it or name another output directory")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(f"the parent directory of {destination} does not exist")
    return destination


@contextlib.contextmanager
def new_directory(destination: str | Path) -> Iterator[Path]:
    """A directory to write into, which takes its final name when the block ends well.

    It is made beside the destination as `.<name>-<random>.incomplete`, so that the rename is
    atomic. An exception removes it; what a kill leaves, the next call for the same name removes.

    Args:
      destination: where the directory is to be; nothing may be there.

    Yields:
      The temporary directory.

    Raises:
      FileExistsError: if something is at the destination, before or after the block.
      FileNotFoundError: if its parent directory is missing.
    """
    destination = check_destination(destination)
    parent = destination.absolute().parent
    temporary = _hidden(parent / destination.name)
    for left in parent.glob(f".{glob.escape(destination.name)}-{'?' * 8}.incomplete"):
        with contextlib.suppress(FileNotFoundError), _locked(left) as nobody_writes:
            if nobody_writes:
                shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        with _locked(temporary):
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            check_destination(destination)
            temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(parent)


def discard(directory: Path) -> None:
    """Removes a directory, if it is there; what a kill leaves of it is no longer under its name."""
    if directory.exists():
        aside = directory.rename(_hidden(directory))
        shutil.rmtree(aside)


def _hidden(directory: Path) -> Path:
    """A new name beside a directory, for what is not, or no longer, complete."""
    return directory.with_name(f".{directory.name}-{secrets.token_hex(4)}.incomplete")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Locks a directory until the block or the process ends; gives False if that cannot be done."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError:  # somebody else has it, or the file system has no locks
        locked = False
    try:
        yield locked
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
