"""The meaning of a lookup-table weight and of its products, in plain ``jax.numpy``."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.layout import unpack


def dequantize(
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None = None,
    *,
    k: int,
    group_size: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """The dense matrix that packed codes stand for.

    ``W[k, n] = lut[t, code[k // p, n], k % p] * scales[k // G, n] + offsets[k // G, n]``, computed
    in float32 and rounded once to ``dtype``.

    Args:
      words: ``uint8[..., ceil(K / (8 p)), b, N]``, see :mod:`pallas_kernels.layout`.
      scales: ``[..., ceil(K / G), N]``; the last group may be shorter.
      lut: ``float32[..., T, 2**b, p]``; T is 1 (one table) or N (one per output channel).
      offsets: Like ``scales``, or None.
      k: The number K of rows.
      group_size: The number G of consecutive rows that share a scale.
      dtype: Of the result.

    Returns:
      ``dtype[..., K, N]``.
    """
    n, p = words.shape[-1], lut.shape[-1]
    codes = unpack(words, -(-k // p)).astype(jnp.int32)
    *batch, rows, _ = codes.shape
    if lut.shape[-3] == 1 and not batch:
        values = lut[0].at[codes].get(mode="promise_in_bounds")  # [K/p, N, p]
    else:
        tables = jnp.broadcast_to(lut, (*batch, n, *lut.shape[-2:])).swapaxes(-3, -2)
        values = jnp.take_along_axis(tables, codes[..., None], axis=-3)
    values = values.swapaxes(-2, -1).reshape(*batch, rows * p, n)[..., :k, :]
    weight = values.astype(jnp.float32) * expand_groups(scales, k, group_size)
    if offsets is not None:
        weight += expand_groups(offsets, k, group_size)
    return weight.astype(dtype)


def expand_groups(scales: jax.Array, k: int, group_size: int) -> jax.Array:
    """Repeats per-group values ``[..., ceil(K / G), N]`` along K as ``float32[..., K, N]``."""
    return jnp.repeat(scales.astype(jnp.float32), group_size, axis=-2)[..., :k, :]


def lut_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` on the dequantised weight; float32 accumulation, ``x.dtype`` out.

    Shapes as in :func:`dequantize` without batch axes; ``x`` is ``[..., K]``, or ``[..., N]`` when
    transposed. The weight is rounded to ``x.dtype`` before the product, as a dense layer of that
    dtype would hold it.
    """
    weight = dequantize(words, scales, lut, offsets, k=k, group_size=group_size, dtype=x.dtype)
    contract = ((x.ndim - 1,), (1 if transpose else 0,))
    product = jax.lax.dot_general(
        x,
        weight,
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product.astype(x.dtype)


def supports(*_: object, **__: object) -> str | None:
    """None: the reference computes everything, at the price of the whole dense weight."""
    return None
