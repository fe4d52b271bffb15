"""The sparse product as a loop over the live rows of the weight: no dead row is read.

Written for XLA on CPU, where a gather of rows followed by a product costs more than the dense
product: the loop has a dynamic number of steps, each of which slices a few live rows and adds their
multiples to the result in one fused pass.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.manual_axes import vary_over, varying_axes
from pallas_kernels.sparse_matmul.blocks import ROWS_TOGETHER, BlockCodes
from pallas_kernels.sparse_matmul.checks import matrix_shape
from pallas_kernels.sparse_matmul.reference import keep
from pallas_kernels.sparse_matmul.rows import RowCodes, field_codes

MAX_ROWS = 4
"""Rows of ``x`` up to which the loop beats a dense product of masked activations on CPU."""

_DENSE_STEP = 8  # rows of the weight a step; each step also reads and writes the result
_CODES_STEP = 2

_ZERO = np.int32(0)  # of the type of other indices; a Python int has 64 bits in x64 mode


def supports(x: Any, weight: Any, thresholds: Any) -> str | None:
    """None if the loop serves these shapes, else the reason why not."""
    del thresholds
    if x.shape[0] > MAX_ROWS:
        return f"{x.shape[0]} rows of x; the loop is for at most {MAX_ROWS}"
    if isinstance(weight, BlockCodes):
        return ROWS_TOGETHER
    if isinstance(weight, RowCodes) and weight.lut.shape[0] > 1:
        return "a table for each column"
    if weight.dtype == jnp.bfloat16 and not isinstance(weight, RowCodes):
        return "a bfloat16 weight, all of which XLA on CPU turns into float32 before the loop"
    return None


def sparse_matmul(x: jax.Array, weight: jax.Array | RowCodes, thresholds: jax.Array) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``."""
    masked = keep(x, thresholds).astype(jnp.float32)
    if not isinstance(weight, RowCodes):
        y = _with_dense(masked, weight.reshape(matrix_shape(weight)))
    else:
        k, size = x.shape[1], weight.group_size
        y = _with_codes(masked, weight)
        y = add_offsets(y, masked, weight.offsets, k=k, group_size=size, transpose=False)
    return y.astype(x.dtype)


def _with_dense(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x @ weight`` from the rows where ``x`` is not zero."""
    n = weight.shape[1]
    live, count = _live_rows(x, _DENSE_STEP)

    def body(step, y):
        for i in range(_DENSE_STEP):
            k = live[step * _DENSE_STEP + i]
            row = lax.dynamic_slice(weight, (k, _ZERO), (1, n)).astype(jnp.float32)
            y += _column(x, k, step * _DENSE_STEP + i < count) * row
        return y

    y = vary_over(jnp.zeros((x.shape[0], n), jnp.float32), varying_axes(x, weight))
    return lax.fori_loop(0, -(-count // _DENSE_STEP), body, y)


def _with_codes(x: jax.Array, weight: RowCodes) -> jax.Array:
    """``x @ weight`` without offsets; sums of a group are scaled once."""
    (k, n), size, fields = weight.shape, weight.group_size, weight.fields
    _, blocks, lanes = weight.words.shape
    groups, m = -(-k // size), x.shape[0]
    together = 8 // weight.bits  # live rows whose codes make one index into a table of sums
    live, _ = _live_rows(x, _CODES_STEP * together)
    alive = jnp.pad(jnp.any(x != 0, axis=0), (0, groups * size - k))
    ends = jnp.cumsum(jnp.sum(alive.reshape(groups, size), axis=1, dtype=jnp.int32))
    table = weight.lut[0, :, 0].astype(jnp.float32)
    entries = np.arange(2 ** (weight.bits * together))
    digits = [(entries >> (weight.bits * i)) % 2**weight.bits for i in range(together)]
    padded = jnp.pad(weight.scales, ((0, 0), (0, blocks * lanes * fields - n)))
    scales = padded.reshape(groups, blocks, fields, lanes)

    def group(g, y):
        first, end = jnp.where(g == 0, 0, ends[g - 1]), ends[g]

        def body(step, sums):
            for i in range(_CODES_STEP):
                place = first + (step * _CODES_STEP + i) * together
                rows = [live[place + j] for j in range(together)]
                words = [
                    lax.dynamic_slice(weight.words, (row, _ZERO, _ZERO), (1, blocks, lanes))[0]
                    for row in rows
                ]
                terms = [
                    _column(x, row, place + j < end) * table[None, digits[j]]
                    for j, row in enumerate(rows)
                ]
                folded = functools.reduce(operator.add, terms)
                sums = tuple(
                    total + jnp.stack([_lookup(folded[i], index) for i in range(m)])
                    for total, index in zip(sums, _joint_codes(words, weight.bits), strict=True)
                )
            return sums

        # The carry is one array a field: stacked in one array they would not be vectorised.
        sums = lax.fori_loop(
            0, -(-(end - first) // (_CODES_STEP * together)), body, (zero,) * fields
        )
        return tuple(
            total + part * scales[g, None, :, f, :].astype(jnp.float32)
            for f, (total, part) in enumerate(zip(y, sums, strict=True))
        )

    axes = varying_axes(x, *jax.tree.leaves(weight))
    zero = vary_over(jnp.zeros((m, blocks, lanes), jnp.float32), axes)
    y = lax.fori_loop(0, groups, group, (zero,) * fields)
    return jnp.stack(y, axis=2).reshape(m, -1)[:, :n]


def _joint_codes(words: list[jax.Array], bits: int) -> list[jax.Array]:
    """For every field, the codes of several rows as the digits of one index."""
    return [
        functools.reduce(
            operator.or_,
            [field_codes(w, bits, f) << np.uint32(bits * i) for i, w in enumerate(words)],
        )
        for f in range(32 // bits)
    ]


def _lookup(table: jax.Array, codes: jax.Array) -> jax.Array:
    return table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _live_rows(x: jax.Array, step: int) -> tuple[jax.Array, jax.Array]:
    """Rows that some activation needs, ascending, padded for a last step; and their number."""
    alive = jnp.any(x != 0, axis=0)
    (live,) = jnp.nonzero(alive, size=x.shape[1] + step, fill_value=0)
    return live.astype(jnp.int32), jnp.sum(alive, dtype=jnp.int32)


def _column(x: jax.Array, k: jax.Array, valid: jax.Array) -> jax.Array:
    column = lax.dynamic_slice(x, (jnp.zeros((), k.dtype), k), (x.shape[0], 1))
    return jnp.where(valid, column, 0.0)
