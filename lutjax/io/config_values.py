"""Values in configurations, checked where they are read so that errors name key and file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


_LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}


def sliding_layers(data: Mapping[str, Any], layers: int, source: str) -> tuple[bool, ...]:
    """Which layers have a sliding window: a list in newer files and a period in older ones.

    Args:
      data: a configuration with `layer_types` or `sliding_window_pattern`.
      layers: the number of layers, for a period.
      source: what to call the configuration in errors.

    Raises:
      ValueError: for another kind of layer, or a period that makes no sense.

    >>> sliding_layers({"sliding_window_pattern": 2}, 3, "config.json")
    (True, False, True)
    """
    types = data.get("layer_types")
    if types is None:
        return layers_by_period(integer(data, "sliding_window_pattern", source), layers)
    unknown = [kind for kind in types if kind not in _LAYER_TYPES.values()]
    if unknown:
        raise ValueError(
            f"{source}: layer_types has {unknown[0]!r}; supported are "
            f"{', '.join(_LAYER_TYPES.values())}"
        )
    return tuple(kind == _LAYER_TYPES[True] for kind in types)


def layers_by_period(period: int, layers: int) -> tuple[bool, ...]:
    """All layers but each `period`-th."""
    return tuple((i + 1) % period != 0 for i in range(layers))


def layer_types(windowed: Sequence[bool]) -> list[str]:
    """What config.json calls layers with and without a sliding window."""
    return [_LAYER_TYPES[window] for window in windowed]
