"""Codes to packed words and back: the canonical layout of every compressed weight.

The layout itself, ``codes [..., K, N] <-> uint8[..., ceil(K/8), bits, N]``, is defined beside the
kernels that read it, in :mod:`pallas_kernels.layout`; this is its name within the library.
"""

from __future__ import annotations

from pallas_kernels.layout import BLOCK, MAX_BITS, pack, packed_shape, unpack

__all__ = ["BLOCK", "MAX_BITS", "pack", "packed_shape", "unpack"]
