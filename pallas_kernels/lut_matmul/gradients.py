"""Gradients of a lookup-table product with respect to scales, table and offsets.

With ``y = x W`` the gradient of the dense weight is ``dW = xᵀ dy`` and

    dscales[g, n]  = Σ_{k in g} dW[k, n] · lut[t, code, k mod p]
    doffsets[g, n] = Σ_{k in g} dW[k, n]
    dlut[t, v, i]  = Σ_{k mod p = i, code = v} dW[k, n] · scales[k / G, n]

``dW`` is never held as a whole: a scan walks over tiles of its rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.layout import BLOCK, unpack
from pallas_kernels.lut_matmul.reference import dequantize
from pallas_kernels.manual_axes import vary_over, varying_axes

TILE_ROWS = 256


@functools.partial(jax.jit, static_argnames=("k", "group_size", "wanted"))
def parameter_gradients(
    left: jax.Array,
    right: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None,
    *,
    k: int,
    group_size: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients of scales, table and offsets for ``dW = leftᵀ right``.

    Args:
      left: ``[M, K]``, the activations (the cotangent when the product was transposed).
      right: ``[M, N]``, the cotangent (the activations when the product was transposed).
      words: ``uint8[ceil(K / (8 p)), bits, N]``.
      scales: ``[ceil(K / G), N]``.
      lut: ``[T, 2**bits, p]``.
      offsets: Like ``scales`` or None.
      k: The number of rows K.
      group_size: Rows that share a scale, G.
      wanted: Which of (scales, table, offsets) to compute; the others are None.

    Returns:
      ``(dscales, dlut, doffsets)`` in the dtypes of their arrays.
    """
    want_scales, want_lut, want_offsets = wanted
    blocks, _, n = words.shape
    tables, entries, p = lut.shape
    tile_blocks = min(blocks, -(-TILE_ROWS // (BLOCK * p)))
    tiles = -(-blocks // tile_blocks)
    rows = tile_blocks * BLOCK * p
    left = jnp.pad(left, ((0, 0), (0, tiles * rows - k)))  # zero rows of dW beyond K
    words = jnp.pad(words, ((0, tiles * tile_blocks - blocks), (0, 0), (0, 0)))
    groups = scales.shape[0]
    touched = (rows - 2) // group_size + 2  # groups that a tile can overlap
    padded_scales = jnp.pad(scales.astype(jnp.float32), ((0, touched), (0, 0)))
    ones = jnp.ones((-(-rows // group_size), n), jnp.float32)

    def tile_gradients(carry, tile):
        dscales, dlut, doffsets = carry
        start = tile * rows
        tile_words = jax.lax.dynamic_slice_in_dim(words, tile * tile_blocks, tile_blocks)
        x = jax.lax.dynamic_slice_in_dim(left, start, rows, axis=1)
        dw = jax.lax.dot_general(
            x,
            right,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        first = jnp.minimum(start // group_size, groups)
        local = (start + jnp.arange(rows)) // group_size - first
        member = (local[None, :] == jnp.arange(touched)[:, None]).astype(jnp.float32)

        def add_groups(total, values):
            sums = jnp.matmul(member, values, precision=jax.lax.Precision.HIGHEST)
            old = jax.lax.dynamic_slice_in_dim(total, first, touched)
            return jax.lax.dynamic_update_slice_in_dim(total, old + sums, first, axis=0)

        if want_scales:
            values = dequantize(tile_words, ones, lut, k=rows, group_size=group_size)
            dscales = add_groups(dscales, dw * values)
        if want_offsets:
            doffsets = add_groups(doffsets, dw)
        if want_lut:
            near = jax.lax.dynamic_slice_in_dim(padded_scales, first, touched)
            scale = near.at[local].get(mode="clip")
            dlut += _table_gradient(dw * scale, tile_words, tables, entries, p)
        return (dscales, dlut, doffsets), None

    zero_groups = jnp.zeros((groups + touched, n), jnp.float32)
    init = (
        zero_groups if want_scales else None,
        jnp.zeros((tables, entries, p), jnp.float32) if want_lut else None,
        zero_groups if want_offsets else None,
    )
    axes = varying_axes(left, right, words, scales, lut)
    init = jax.tree.map(lambda a: vary_over(a, axes), init)
    (dscales, dlut, doffsets), _ = jax.lax.scan(tile_gradients, init, jnp.arange(tiles))
    return (
        dscales[:groups].astype(scales.dtype) if dscales is not None else None,
        dlut.astype(lut.dtype) if dlut is not None else None,
        doffsets[:groups].astype(offsets.dtype)
        if doffsets is not None and offsets is not None
        else None,
    )


def _table_gradient(
    values: jax.Array, words: jax.Array, tables: int, entries: int, p: int
) -> jax.Array:
    """Sums ``values`` ``[rows, N]`` by code, one code at a time: deterministic, no scatter."""
    codes = unpack(words)  # [rows / p, N]
    values = values.reshape(codes.shape[0], p, codes.shape[1])
    axes = (0, 2) if tables == 1 else (0,)

    def one(code):
        return jnp.sum(jnp.where((codes == code)[:, None, :], values, 0.0), axis=axes)

    sums = jax.lax.map(one, jnp.arange(entries, dtype=jnp.uint8))  # [2**b, p] or [2**b, p, N]
    return sums[None] if tables == 1 else jnp.moveaxis(sums, -1, 0)
