"""The canonical packed layout of integer codes, the same on disk, in a pytree and for every device.

Eight consecutive codes of one column form one little-endian integer of ``8 * bits`` bits, which is
stored in ``bits`` bytes: code ``i`` of a block occupies the bits ``[i * bits, (i + 1) * bits)``.

    codes [..., K, N]  <->  words uint8[..., ceil(K / 8), bits, N]

Why this one:

* ``bits`` and N can be read off the shape, so slicing, stacking, ``vmap`` and ``shard_map`` keep it
  true; only the padding of K to a multiple of eight is not stored.
* N can be split anywhere and K at every multiple of eight without repacking (tensor parallelism).
* N stays the contiguous axis, so unpacking is plain shifts of whole rows, without shuffles.
* Every bit width from 1 to 8 follows the same rule; 2, 4 and 8 bits are the familiar crumbs,
  nibbles and bytes in ascending order.

A kernel that wants another order takes it from a ``prepack`` function at load time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 8
"""Codes in one packed block along K; a block of ``b``-bit codes takes exactly ``b`` bytes."""

MAX_BITS = 8


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Shape of the words that hold codes of ``shape`` ``[..., K, N]``.

    >>> packed_shape((576, 192), bits=4)
    (72, 4, 192)
    """
    *batch, k, n = shape
    return (*batch, -(-k // BLOCK), bits, n)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs integer codes into the canonical words.

    Args:
      codes: Integers in ``[0, 2**bits)`` of shape ``[..., K, N]``; higher bits are dropped.
      bits: Bits per code, 1 to 8.

    Returns:
      ``uint8[..., ceil(K / 8), bits, N]``; K is padded with zero codes.

    Raises:
      ValueError: If ``bits`` is not in 1..8 or ``codes`` has fewer than two axes.
      TypeError: If ``codes`` are not integers.

    >>> import jax.numpy as jnp
    >>> pack(jnp.array([[1], [2], [3]]), bits=4)[0, :, 0].tolist()
    [33, 3, 0, 0]
    """
    _check_bits(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}")
    if codes.ndim < 2:
        raise ValueError(f"codes must have shape [..., K, N], got {codes.shape}")
    *batch, k, n = codes.shape
    padding = [(0, 0)] * len(batch) + [(0, -k % BLOCK), (0, 0)]
    mask = np.uint8(2**bits - 1)
    codes = jnp.pad(codes.astype(jnp.uint8) & mask, padding)
    codes = codes.reshape(*batch, -1, BLOCK, n)
    words = []
    for byte in range(bits):
        word = jnp.zeros((*batch, codes.shape[-3], n), jnp.uint8)
        for i in range(BLOCK):
            shift = i * bits - 8 * byte  # position of code i relative to this byte
            if -bits < shift < 8:
                code = codes[..., i, :]
                word |= code << np.uint8(shift) if shift >= 0 else code >> np.uint8(-shift)
        words.append(word)
    return jnp.stack(words, axis=-2)


def unpack(words: jax.Array, k: int | None = None) -> jax.Array:
    """Unpacks canonical words; the inverse of :func:`pack`.

    Args:
      words: ``uint8[..., ceil(K / 8), bits, N]``.
      k: Number of codes to return along K; ``None`` returns the padded ones too.

    Returns:
      ``uint8[..., K, N]``.

    Raises:
      ValueError: If ``words`` has the wrong shape or holds fewer than ``k`` codes.
      TypeError: If ``words`` are not ``uint8``.

    >>> import jax.numpy as jnp
    >>> codes = jnp.array([[5, 1], [7, 0], [2, 3]], jnp.uint8)
    >>> unpack(pack(codes, bits=3), k=3).tolist()
    [[5, 1], [7, 0], [2, 3]]
    """
    if words.dtype != jnp.uint8:
        raise TypeError(f"words must be uint8, got {words.dtype}")
    if words.ndim < 3:
        raise ValueError(f"words must have shape [..., ceil(K/8), bits, N], got {words.shape}")
    *batch, blocks, bits, n = words.shape
    _check_bits(bits)
    padded = blocks * BLOCK
    k = padded if k is None else k
    if k > padded:
        raise ValueError(f"k={k} codes asked for, but words of shape {words.shape} hold {padded}")
    codes = jnp.stack([block_code(words, i) for i in range(BLOCK)], axis=-2)
    codes = codes.reshape(*batch, padded, n)
    return codes if k == padded else codes[..., :k, :]


def block_code(words: jax.Array, i: int) -> jax.Array:
    """Code ``i`` (0..7) of every block, ``uint8[..., blocks, N]``."""
    bits = words.shape[-2]
    mask = np.uint8(2**bits - 1)
    byte, shift = divmod(i * bits, 8)
    code = words[..., byte, :] >> np.uint8(shift)
    if shift + bits > 8:
        code |= words[..., byte + 1, :] << np.uint8(8 - shift)
    return code & mask


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits} is not supported; use 1 to {MAX_BITS}")
