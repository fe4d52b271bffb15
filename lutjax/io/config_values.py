"""Numbers in configurations, checked where they are read so that errors name key and file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def integer(
    data: Mapping[str, Any], key: str, source: str, default: int | None = None, *, least: int = 1
) -> int:
    """The integer of a key.

    Args:
      data: a configuration.
      key: the key.
      source: what to call the configuration in errors.
      default: what a missing key means; None if it has to be there.
      least: the smallest that makes sense.

    Raises:
      ValueError: if it is missing, null, too small or not an integer.

    >>> integer({"hidden_size": 8}, "hidden_size", "config.json")
    8
    """
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{source}: {key!r} is {value!r}, not an integer of at least {least}")
    return value


def positive(data: Mapping[str, Any], key: str, source: str, default: float | None = None) -> float:
    """The positive number of a key; see `integer`.

    Raises:
      ValueError: if it is missing, null, not positive, not finite or not a number.

    >>> positive({}, "rope_theta", "config.json", 1e4)
    10000.0
    """
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{source}: {key!r} is {value!r}, not a positive number")
    return float(value)
