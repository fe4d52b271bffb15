"""What a Hopper GPU has, as far as kernels must know it."""

from __future__ import annotations

import re

SHARED_MEMORY = 226 * 1024
"""Bytes that one block can have."""

MEMORY_REGISTERS = 40
"""Registers of a thread that copies; those that compute share the rest."""


def is_hopper(kind: str) -> bool:
    """Whether the kernels run on a device of this kind."""
    return any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200"))


def multiprocessors(kind: str | None) -> int:
    """Number of multiprocessors of a Hopper device; 132, which most have, if ``kind`` is None.

    >>> multiprocessors("NVIDIA H20"), multiprocessors("NVIDIA H200")
    (78, 132)
    """
    kind = kind or ""
    if re.search(r"\bH20\b", kind):
        return 78
    return 114 if "PCIe" in kind else 132  # an H100 PCIe
