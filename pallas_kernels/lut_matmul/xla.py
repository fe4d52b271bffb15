"""``lut_matmul`` without a kernel: XLA programs that never hold the whole dequantised weight.

One or two rows of activations on a CPU (decoding): the activations are folded into the table, so
that one load serves every code in a byte. With m codes a field,

    y[n] = sum_g scales[g, n] * sum_{r in g} tables[r, field[r, n]],
    tables[r, f] = sum_{i < m} x[m r + i] * lut[code i of f].

Everything else: tiles of rows are dequantised one after another and multiplied as dense matrices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.layout import BLOCK, unpack
from pallas_kernels.lut_matmul import reference
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.manual_axes import is_partitioned_automatically, vary_over, varying_axes

MAX_FOLDED_ROWS = 2
"""Rows of activations up to which a table per row costs less than dequantising (measured)."""

_TILE = 1 << 20
"""Weights dequantised at a time: 4 MB, about a last-level cache's share of one core."""

_TILE_ACCELERATOR = 1 << 25
"""The same on a GPU or TPU: 64 MB in bfloat16; every round of the loop costs launches there."""

_LOOKUPS = 1 << 19
"""Looked-up values held at a time when the activations are folded into the table."""

_TILE_COLUMNS = 8192
"""Most columns of a tile on a CPU."""

_ALIGNED = 64
"""Ranges of columns are a multiple of this."""

_UNIT = 512
"""Most rows whose folded values are summed before the scale is applied."""


def supports(
    x: Any, words: Any, scales: Any, lut: Any, offsets: Any = None, **static
) -> str | None:
    """None: every product can run."""
    return None


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
    """``x @ W`` or ``x @ W.T``; arguments and meaning as in the reference.

    A product with at most ``MAX_FOLDED_ROWS`` rows on a CPU keeps the weight in float32 where the
    reference rounds it to ``x.dtype``.
    """
    rows = x.reshape(-1, x.shape[-1])
    operands = (rows, words, scales, lut, offsets)
    tiled = functools.partial(_tiled, k=k, group_size=group_size, transpose=transpose)
    if not transpose and _folds(rows, words, lut, k, group_size):
        folded = functools.partial(_folded, k=k, group_size=group_size)
        y = jax.lax.platform_dependent(*operands, cpu=folded, default=tiled)
    else:
        y = tiled(*operands)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


# Tiles ------------------------------------------------------------------------------------------


def _tiled(x, words, scales, lut, offsets, *, k, group_size, transpose):
    """The product, float32 ``[M, N]``; a loop over tiles of rows if the weight is large."""
    groups = np.arange(k, dtype=np.int32) // np.int32(group_size)

    def columns(words, scales, lut, offsets):
        def product(x, words, groups):
            weight = reference.dequantize(
                words,
                scales[groups],
                lut,
                None if offsets is None else offsets[groups],
                k=len(groups),
                group_size=1,
                dtype=x.dtype,
            )
            return _dot(x, weight, transpose)

        zeros = jnp.zeros((x.shape[0], words.shape[-1]), jnp.float32)
        zeros = vary_over(zeros, varying_axes(x, words, scales, lut, offsets))
        block = BLOCK * lut.shape[-1]
        return over_tiles(product, x, words, groups, zeros, block=block, transpose=transpose)

    # Tiles of few rows would add to all sums again and again.
    wide = not transpose and platforms.compiling_for("cpu")
    most = _TILE_COLUMNS if wide else words.shape[-1]
    return _over_columns(columns, words, scales, lut, offsets, most=most)


def _over_columns(product, words, scales, lut, offsets, *, most: int):
    """``product(words, scales, lut, offsets)`` for one range of columns after another.

    A range has ``most`` columns, the last one maybe fewer. All of them are one if they are no more,
    or are known to lie on several devices, where a slice would bring them together; of the
    ``in_shardings`` of a ``jax.jit`` a traced array knows nothing.
    """
    n = words.shape[-1]
    if n <= most or is_partitioned_automatically(words):
        return product(words, scales, lut, offsets)
    full = n // most

    def part(start, size):
        def cut(array, axis=-1):
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

        own = cut(lut, 0) if lut.shape[0] > 1 else lut
        return product(cut(words), cut(scales), own, None if offsets is None else cut(offsets))

    starts = np.arange(full, dtype=np.int32) * np.int32(most)
    parts = jax.lax.map(lambda start: part(start, most), starts)
    y = parts.swapaxes(0, 1).reshape(-1, full * most)
    if full * most == n:
        return y
    return jnp.concatenate([y, part(full * most, n - full * most)], axis=1)


def over_tiles(product, x, words, groups, zeros, *, block, transpose):
    """A product with a weight of which one tile of rows after another is dequantised.

    Args:
      product: ``(x, words, groups) -> float32[M, N or R]``, the product with R rows of the weight;
        its ``x`` is ``[M', R]``, or all of ``x`` when transposed.
      x: ``[M', K]``, or ``[M, N]`` when transposed.
      words: Codes; the leading axis is that of rows or of blocks of them.
      groups: ``int32[K]``, an entry for each row that ``product`` is given for those of the tile.
      zeros: ``float32[M, N]``, where sums start.
      block: Rows of one entry of ``words``; a tile has whole blocks.
      transpose: Whether results are joined instead of added.
    """
    k = len(groups)
    rows = _tile_rows(zeros.shape[-1], block)
    full = k // rows if k > rows else 0
    if not full:
        return product(x, words, groups)
    blocks = rows // block
    tiles = words[: full * blocks].reshape(full, blocks, *words.shape[1:])
    tile_groups = groups[: full * rows].reshape(full, rows)
    rest = (words[full * blocks :], groups[full * rows :])
    if transpose:
        parts = jax.lax.map(lambda tile: product(x, *tile), (tiles, tile_groups))
        y = parts.swapaxes(0, 1).reshape(x.shape[0], full * rows)
        return jnp.concatenate([y, product(x, *rest)], axis=1) if len(rest[1]) else y
    parts = x[:, : full * rows].reshape(-1, full, rows).swapaxes(0, 1)

    def add(y, tile):
        return y + product(*tile), None

    y, _ = jax.lax.scan(add, zeros, (parts, tiles, tile_groups))
    return y + product(x[:, full * rows :], *rest) if len(rest[1]) else y


def _tile_rows(n: int, block: int) -> int:
    """Rows of a tile: whole blocks of codes."""
    weights = _TILE if platforms.compiling_for("cpu") else _TILE_ACCELERATOR
    return max(weights // n // block, 1) * block


def _dot(x, weight, transpose):
    contract = ((1,), (1 if transpose else 0,))
    return jax.lax.dot_general(
        x,
        weight,
        (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


# Activations folded into the table --------------------------------------------------------------


def _folds(x, words, lut, k: int, group_size: int) -> bool:
    few = isinstance(x.shape[0], int) and x.shape[0] <= MAX_FOLDED_ROWS  # else it is symbolic
    one_table = lut.shape[0] == 1 and lut.shape[-1] == 1
    return few and one_table and (group_size % BLOCK == 0 or group_size >= k)


def _folded(x, words, scales, lut, offsets, *, k, group_size):
    """The product, float32 ``[M, N]``, by tables of ``x * lut``."""
    padded = words.shape[0] * BLOCK
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, padded - k)])
    scales = scales.astype(jnp.float32)
    group = padded if group_size >= k else group_size
    unit = max(d for d in range(BLOCK, _UNIT + BLOCK, BLOCK) if group % d == 0)
    unit_scales = jnp.repeat(scales, group // unit, axis=0)[: -(-padded // unit)]

    def columns(words, unit_scales, lut, _):
        rows = [_folded_row(row, words, unit_scales, lut.reshape(-1), unit) for row in x]
        return jnp.stack(rows)

    most = max(_LOOKUPS * _codes_per_field(words.shape[1]) // unit // _ALIGNED, 1) * _ALIGNED
    y = _over_columns(columns, words, unit_scales, lut, None, most=most)
    return add_offsets(y, x, offsets, k=k, group_size=group, transpose=False)


def _folded_row(x, words, scales, table, unit: int):
    """One row: ``x`` ``[K]``, ``words`` ``[K/8, b, N]``, ``scales`` ``[ceil(K/unit), N]``."""
    blocks, bits, n = words.shape
    codes = _codes_per_field(bits)
    full = blocks * BLOCK // unit
    per_step = _largest_divisor(full, _LOOKUPS * codes // (unit * n)) if full else 0
    product = functools.partial(_folded_product, table=table)
    y = jnp.zeros(n, jnp.float32)
    if full:
        steps, rows = full // per_step, per_step * unit
        xs = (
            x[: full * unit].reshape(steps, rows),
            words[: full * unit // BLOCK].reshape(steps, rows // BLOCK, bits, n),
            scales[:full].reshape(steps, per_step, n),
        )
        if steps == 1:
            y = product(*(a[0] for a in xs))
        else:
            y, _ = jax.lax.scan(lambda y, step: (y + product(*step), None), y, xs)
    if full * unit < blocks * BLOCK:
        rest = product(x[full * unit :], words[full * unit // BLOCK :], scales[full:])
        y = rest if not full else y + rest
    return y


def _folded_product(x, words, scales, table):
    """Whole units of one row: ``x`` ``[U * unit]``, ``scales`` ``[U, N]``; returns ``[N]``."""
    bits, n = words.shape[1:]
    codes = _codes_per_field(bits)
    basis = np.stack([_digit(np.arange(2 ** (codes * bits)), i, bits) for i in range(codes)])
    # A dot, because XLA:CPU would fuse a product into the gather and compute it once a lookup. The
    # tables lie in reverse: descending starts are a constant that XLA reads, ascending ones an iota
    # that it computes, by a 64-bit division for every lookup.
    tables = _dot(x.reshape(-1, codes)[::-1], table[basis], transpose=False)
    fields = _fields(words, codes).astype(jnp.uint32)
    starts = np.arange(fields.shape[0], dtype=np.uint32)[::-1] * np.uint32(basis.shape[1])
    values = _take(tables.reshape(-1), fields + starts[:, None])
    sums = values.reshape(scales.shape[0], -1, n).sum(axis=1)
    return jnp.sum(sums * scales, axis=0)


def _codes_per_field(bits: int) -> int:
    """Codes that one lookup serves: as many as fit a byte and divide a block."""
    return {1: 8, 2: 4, 3: 2, 4: 2}.get(bits, 1)


def _digit(fields: np.ndarray, i: int, bits: int) -> np.ndarray:
    return (fields >> (i * bits)) & (2**bits - 1)


def _fields(words, codes: int):
    """The packed rows, ``codes`` codes a row: ``uint8[blocks * 8 / codes, N]``."""
    bits, n = words.shape[1:]
    if codes * bits == 8:
        return words.reshape(-1, n)
    if codes == 1:
        return unpack(words)
    # Two 3-bit codes are one 6-bit field: 4 fields in 3 bytes.
    low, middle, high = (words[:, i] for i in range(3))
    mask = np.uint8(63)
    fields = (
        low & mask,
        ((low >> np.uint8(6)) | (middle << np.uint8(2))) & mask,
        ((middle >> np.uint8(4)) | (high << np.uint8(4))) & mask,
        high >> np.uint8(2),
    )
    return jnp.stack(fields, axis=1).reshape(-1, n)


def _take(table, indices):
    """``table[indices]`` without the code for negative or large indices."""
    dimensions = jax.lax.GatherDimensionNumbers(
        offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return jax.lax.gather(
        table,
        indices[..., None],
        dimensions,
        (1,),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, max(min(number, limit), 1) + 1) if number % d == 0)
