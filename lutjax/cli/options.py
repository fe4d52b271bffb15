"""Options that exclude each other."""

from __future__ import annotations

import dataclasses
from typing import Any


def refuse_beside(command: Any, given: str, *options: str) -> None:
    """Raises if one of a command's options was set beside one that makes it meaningless.

    Args:
      command: a dataclass of options with defaults.
      given: the flag that was given.
      options: names of fields that go without a meaning then.

    Raises:
      ValueError: names both flags.
    """
    for field in dataclasses.fields(command):
        if field.name in options and getattr(command, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise ValueError(f"give either {given} or {flag}, not both")
