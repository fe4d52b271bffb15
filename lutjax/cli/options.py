"""Options that exclude each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

_PICTURES = (".png", ".svg", ".pdf", ".jpg")


def refuse_beside(command: Any, given: str, *options: str) -> None:
    """Raises if one of a command's options was set beside one that makes it meaningless.

    Args:
      command: a dataclass of options with defaults.
      given: the flag that was given.
      options: names of fields that go without a meaning then.

    Raises:
      ValueError: names both flags.
    """
    for flag in _given(command, options):
        raise ValueError(f"give either {given} or {flag}, not both")


def refuse_without(command: Any, missing: str, *options: str) -> None:
    """Raises if one of a command's options was set without the one that gives it a meaning.

    Args:
      command: a dataclass of options with defaults.
      missing: the flag that was not given.
      options: names of fields that go without a meaning then.

    Raises:
      ValueError: names both flags.
    """
    for flag in _given(command, options):
        raise ValueError(f"{flag} needs {missing}")


def check_plot(path: Path | None) -> None:
    """Raises before anything is computed if a plot could not be written in that format.

    Raises:
      ValueError: names the file and the formats.
    """
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise ValueError(f"--plot {path}: use a name that ends in {', '.join(_PICTURES)}")


def _given(command: Any, options: tuple[str, ...]) -> list[str]:
    return [
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(command)
        if field.name in options and getattr(command, field.name) != field.default
    ]
