"""Tuned configurations, one JSON file per kind of device.

``python -m pallas_kernels.tune`` writes them. A file maps an implementation to entries ``{"bits",
"m", "k", "n", "config", "microseconds"}``. An entry serves its exact weight shape and the rows up
to its ``m``; whatever has no entry gets the implementation's heuristic.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

_FOLDER = Path(__file__).parent


def file_of(device_kind: str) -> Path:
    """Where the entries of a device are kept; ``PALLAS_KERNELS_TUNING`` names another folder."""
    folder = Path(os.environ.get("PALLAS_KERNELS_TUNING", _FOLDER))
    return folder / (device_kind.lower().replace(" ", "-").replace("/", "-") + ".json")


@functools.cache
def _entries(path: Path) -> dict[str, list[dict]]:
    return json.loads(path.read_text()) if path.exists() else {}


def lookup(
    implementation: str, device_kind: str | None, *, bits: int, m: int, k: int, n: int
) -> dict | None:
    """The tuned configuration for a product, or None.

    >>> lookup("mosaic_gpu", "an unknown device", bits=4, m=1, k=64, n=64) is None
    True
    """
    if device_kind is None:
        return None
    found = [
        entry
        for entry in _entries(file_of(device_kind)).get(implementation, [])
        if (entry["bits"], entry["k"], entry["n"]) == (bits, k, n) and m <= entry["m"]
    ]
    return min(found, key=lambda entry: entry["m"])["config"] if found else None


def save(implementation: str, device_kind: str, entries: list[dict]) -> Path:
    """Merges ``entries`` into the device's file; newer ones replace those of the same product."""
    path = file_of(device_kind)
    known = json.loads(path.read_text()) if path.exists() else {}

    def name(entry: dict) -> tuple:
        return entry["bits"], entry["k"], entry["n"], entry["m"]

    merged = {name(e): e for e in [*known.get(implementation, []), *entries]}
    known[implementation] = [merged[key] for key in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    temporary.rename(path)
    _entries.cache_clear()
    return path
