"""The rotation that makes the entries of any weight look normal: random signs, then Hadamard.

Every block of ``h`` consecutive rows of a weight is multiplied by ``H D``: D flips signs, H is the
Hadamard matrix divided by ``sqrt(h)``. The product is orthogonal, so ``x @ W`` is
``rotate(x) @ rotate(W.T).T``; an entry of the result is a sum of ``h`` weights with random signs,
which the central limit theorem makes nearly normal. The signs are those of a fixed sequence, the
same for every block and every weight: they are not stored, blocks can be cut and split, and
matrices that share ``x`` rotate it once.

Source: HIGGS (arXiv 2411.17525, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8
from scipy.linalg import hadamard

from lutjax.dtypes import at_least_float32


@functools.cache
def signs(count: int) -> Int8[np.ndarray, "count"]:
    """The first signs of the sequence: the highest bits of SplitMix64 from 0; never changes.

    >>> signs(8).tolist()
    [-1, 1, 1, -1, 1, 1, 1, -1]
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.where(z >> np.uint64(63), -1, 1).astype(np.int8)


def rotate(x: Float[Array, "... k"], block: int) -> Float[Array, "... k"]:
    """Multiplies every block of the last axis by ``H D``; in at least float32, result like ``x``.

    Args:
      x: ``[..., K]``. What is left beyond whole blocks is rotated in blocks of smaller powers of
        two, the largest first, with the signs of their places.
      block: A power of two.

    Returns:
      ``[..., K]``, of the same norm.

    >>> rotate(jnp.array([1.0, 2.0, 3.0, 4.0]), 4).tolist()
    [0.0, 2.0, 1.0, -5.0]
    """
    return _by_blocks(x, block, lambda x, signs: _hadamard(x * signs))


def rotate_back(x: Float[Array, "... k"], block: int) -> Float[Array, "... k"]:
    """The inverse of :func:`rotate`, which is its transpose.

    >>> rotate_back(jnp.array([0.0, 2.0, 1.0, -5.0]), 4).tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    return _by_blocks(x, block, lambda x, signs: _hadamard(x) * signs)


def is_power_of_two(value: int) -> bool:
    """Whether a block may have this size.

    >>> [is_power_of_two(value) for value in (1, 48, 64)]
    [True, False, True]
    """
    return value > 0 and value & (value - 1) == 0


def _by_blocks(
    x: jax.Array, block: int, transform: Callable[[jax.Array, np.ndarray], jax.Array]
) -> jax.Array:
    if not is_power_of_two(block):
        raise ValueError(f"block={block} must be a power of two")
    *lead, k = x.shape
    wide = x.astype(at_least_float32(x.dtype))

    def rotated(start: int, stop: int, size: int) -> jax.Array:
        blocks = wide[..., start:stop].reshape(*lead, -1, size)
        first = start % block
        of_each = signs(block)[first : first + size].astype(wide.dtype)
        of_each = of_each.reshape((1,) * (blocks.ndim - 1) + (size,))
        return transform(blocks, of_each).reshape(*lead, stop - start)

    done = k - k % block
    parts = [rotated(0, done, block)] if done else []
    while done < k:
        size = 1 << (k - done).bit_length() - 1
        parts.append(rotated(done, done + size, size))
        done += size
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def _hadamard(x: jax.Array) -> jax.Array:
    """``x @ H / sqrt(h)`` along the last axis, as products with two matrices of about ``sqrt(h)``.

    H of size ``a b`` is the Kronecker product of those of size a and b.
    """
    *lead, size = x.shape
    a = 1 << (size.bit_length() - 1) // 2
    exact = jax.lax.Precision.HIGHEST
    x = x.reshape(*lead, a, size // a)
    x = jnp.einsum("...ab,bc->...ac", x, hadamard(size // a).astype(x.dtype), precision=exact)
    x = jnp.einsum("...ab,ca->...cb", x, hadamard(a).astype(x.dtype), precision=exact)
    return (x / np.sqrt(size).astype(x.dtype)).reshape(*lead, size)
