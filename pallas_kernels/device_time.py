"""How long a GPU was busy with a call, as the profiler saw it.

The wall time of a small kernel is that of its launch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax

CACHE_BYTES = 128 << 20
"""Twice the last-level cache of an H200."""
MOST_COPIES = 32


def copies_beyond_cache(size: int) -> int:
    """Copies of a weight of ``size`` bytes that exceed the cache together, at most 32.

    A program that reads them in turn finds none of them in the cache.

    >>> copies_beyond_cache(50 << 20)
    3
    """
    return min(MOST_COPIES, max(1, -(-CACHE_BYTES // size)))


def busy_seconds(function: Any, *args: Any, runs: int = 5) -> float | None:
    """The sum of the durations of all that a GPU did in a call of a compiled function.

    Args:
      function: Compiled and warmed up before, so that only its own work is seen.
      *args: Its arguments.
      runs: Calls, of which the mean is taken.

    Returns:
      Seconds a call, or None where there is no GPU or its profiler (CUPTI) saw nothing.
    """
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(function(*args))
        profiles = [
            jax.profiler.ProfileData.from_file(str(file))
            for file in Path(folder).rglob("*.xplane.pb")
        ]
    nanoseconds = [
        event.duration_ns
        for profile in profiles
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sum(nanoseconds) / 1e9 / runs if nanoseconds else None
