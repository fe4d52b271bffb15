"""Lookup-table codes packed along N, so that every row of the weight can be read on its own.

The canonical layout (:mod:`pallas_kernels.layout`) packs eight rows together. Here a 32-bit word
holds ``F = 32 // bits`` codes of one row: N is cut into blocks of ``F * L`` columns, and field
``f`` of word ``j`` of a block is column ``f * L + j``, so that unpacking is plain shifts of
contiguous slices. 2 and 4 bits fill the words; 3 bits take 3.2 bits a code.

    codes [K, N]  <->  words uint32[K, ceil(N / (F L)), L]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lut_matmul.reference import expand_groups

KERNEL_LANES = {"gpu": 32, "tpu": 128}
"""Words of a block that a platform's kernel reads; CPUs skip rows of the canonical layout."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCodes:
    """A lookup-table weight whose rows can be read one by one.

    Attributes:
      words: ``uint32[K, blocks, L]``, see :func:`pack_rows`.
      scales: ``[ceil(K / G), N]``.
      lut: ``[T, 2**bits, 1]``; T = 1 or N tables.
      offsets: Like ``scales``, or None.
      group_size: Rows G that share a scale.
    """

    words: jax.Array
    scales: jax.Array
    lut: jax.Array
    offsets: jax.Array | None
    group_size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.words.shape[0], self.scales.shape[-1]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.lut.shape[-2].bit_length() - 1

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return 32 // self.bits

    @property
    def dtype(self) -> Any:
        """Dtype of the scales."""
        return self.scales.dtype


def pack_rows(codes: jax.Array, bits: int, lanes: int | None = None) -> jax.Array:
    """Packs codes so that rows stay apart.

    Args:
      codes: Integers in ``[0, 2**bits)`` of shape ``[..., K, N]``.
      bits: Bits per code, 1 to 8.
      lanes: Words L in a block; None puts a whole row into one block.

    Returns:
      ``uint32[..., K, ceil(N / (F L)), L]``; N is padded with zero codes.

    >>> pack_rows(jnp.array([[1, 2, 3, 4]]), bits=4, lanes=2)[0, 0].tolist()
    [49, 66]
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not supported; use 1 to 8")
    *lead, n = codes.shape
    fields = 32 // bits
    lanes = lanes or -(-n // fields)
    padding = [(0, 0)] * len(lead) + [(0, -n % (fields * lanes))]
    codes = jnp.pad(codes.astype(jnp.uint32), padding).reshape(*lead, -1, fields, lanes)
    words = jnp.zeros((*codes.shape[:-2], lanes), jnp.uint32)
    for field in range(fields):
        words |= codes[..., field, :] << np.uint32(field * bits)
    return words


def unpack_rows(words: jax.Array, bits: int, n: int) -> jax.Array:
    """The codes ``uint8[..., K, N]`` of words from :func:`pack_rows`."""
    codes = jnp.stack([field_codes(words, bits, f) for f in range(32 // bits)], axis=-2)
    return codes.reshape(*words.shape[:-2], -1)[..., :n].astype(jnp.uint8)


def field_codes(words: jax.Array, bits: int, field: int) -> jax.Array:
    """The codes in one field of every word, ``uint32``."""
    return (words >> np.uint32(field * bits)) & np.uint32(2**bits - 1)


def dequantize_rows(weight: RowCodes, dtype: Any = jnp.float32) -> jax.Array:
    """The dense matrix ``dtype[K, N]``, computed in float32 and rounded once."""
    k, n = weight.shape
    codes = unpack_rows(weight.words, weight.bits, n).astype(jnp.int32)
    if weight.lut.shape[0] == 1:
        values = weight.lut[0, :, 0].at[codes].get(mode="promise_in_bounds")
    else:
        values = jnp.take_along_axis(weight.lut[:, :, 0].T, codes, axis=0)
    dense = values.astype(jnp.float32) * expand_groups(weight.scales, k, weight.group_size)
    if weight.offsets is not None:
        dense += expand_groups(weight.offsets, k, weight.group_size)
    return dense.astype(dtype)
