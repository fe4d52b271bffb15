"""The lookup-table product as a Pallas kernel for TPUs (Mosaic).

Codes become weights by sublane gathers in vector registers and go straight to the matrix unit.
Few rows of ``x``: the scale of a group multiplies the group's partial sums, so that a weight costs
about 2.2 vector operations per 1024 codes. Many rows, or the transposed product: the scale
multiplies the weights instead, which the reference does too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platforms
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.lut_matmul.mosaic_tpu_layout import (
    PLANES,
    ROWS,
    Lookup,
    pack_planes,
    tables,
    unit,
)
from pallas_kernels.lut_matmul.mosaic_tpu_lookup import LANES, byte_constants, lookup_rows
from pallas_kernels.manual_axes import shape_struct

_BYTE_GATHER = ("TPU v6", "TPU7x", "TPU v7")
_CHUNK = 256  # rows of the weight that one call of the matrix unit contracts, at most


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes and the lookup; all sizes in codes (K / p of them in a column)."""

    block_m: int
    block_k: int
    block_n: int
    lookup: Lookup
    scale_weights: bool


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static sizes after padding."""

    bits: int
    p: int
    group: int  # codes that share a scale
    padded_k: int
    padded_n: int
    config: Config
    transpose: bool

    @property
    def k_tiles(self) -> int:
        return self.padded_k // self.config.block_k

    @property
    def segment(self) -> int:
        """Codes of a tile that share a scale."""
        return min(self.group, self.config.block_k)


def supports(
    x: Any,
    words: Any,
    scales: Any,
    lut: Any,
    offsets: Any = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> str | None:
    """None if the kernel can run these shapes and dtypes, else the reason why not."""
    del offsets
    bits, n = words.shape[1:]
    tables_, _, p = lut.shape
    if bits not in PLANES:
        return f"{bits}-bit codes; the TPU kernel has {tuple(PLANES)}"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"activations of {x.dtype}; use bfloat16, float16 or float32"
    if tables_ > 1 and (platforms.device_kind("tpu") or "").startswith("TPU v4"):
        return f"a table for each of {n} columns on TPU v4, which cannot gather sublanes"
    if bits == 8 and tables_ > 1:
        return f"a table for each of {n} columns at 8 bits; at most 4 bits"
    if scales.shape[0] > 1 and (group_size % p or (group_size // p) % ROWS):
        return (
            f"group_size={group_size} with p={p}; the TPU kernel takes multiples of {ROWS * p}, "
            f"or one group a column (group_size >= {k})"
        )
    target = 2048 if _is_few(x.shape[0], transpose) else 512
    if _block_k(bits, _group_codes(k, group_size, p), -(-k // p), target) is None:
        return (
            f"group_size={group_size} has no common tile with {unit(bits)} codes for "
            f"{x.shape[0]} rows"
        )
    return None


def default_config(
    m: int,
    bits: int,
    *,
    codes: int,
    group: int,
    n: int,
    dtype: Any,
    per_channel: bool,
    transpose: bool,
    device_kind: str | None,
    computed: bool = False,
) -> Config:
    """A sane configuration for any shape and device."""
    lookup = _lookup(bits, dtype, per_channel, device_kind, computed)
    few = _is_few(m, transpose)
    block_n = min(512, -(-n // LANES) * LANES)
    target = (2048 if lookup in ("wide", "lane") else 4096) if few else 512
    block_k = _block_k(bits, group, codes, target)
    if block_k is None:
        raise ValueError(f"groups of {group} codes have no tile of at most {target}")
    rows = 8 if jnp.dtype(dtype).itemsize == 4 else 16
    return Config(min(512, -(-m // rows) * rows), block_k, block_n, lookup, not few)


def _is_few(m: int, transpose: bool) -> bool:
    return m <= 64 and not transpose


def _lookup(bits: int, dtype: Any, per_channel: bool, kind: str | None, computed: bool) -> Lookup:
    known = kind or ""
    if computed and known.startswith(_BYTE_GATHER) and dtype == jnp.bfloat16:
        return "int8"
    if computed and bits >= 4:  # fewer bits are shifted and masked more often than looked up
        return "int32"
    if bits > 4:
        return "lane"
    if known.startswith("TPU v4") and not per_channel:
        return "lane"
    if dtype != jnp.bfloat16:
        return "wide"
    if known.startswith(_BYTE_GATHER):
        return "byte"
    return "pair" if per_channel or bits < 4 else "mixed"


def _group_codes(k: int, group_size: int, p: int) -> int:
    """Codes of a group; 0 stands for one group a column."""
    return 0 if group_size >= k else group_size // p


def _block_k(bits: int, group: int, codes: int, target: int) -> int | None:
    """The tile length near ``target`` that wastes the least padding; None if there is none.

    Blocks of ``x``, or of transposed products, are as long: whole lanes where there are several.
    """
    step = unit(bits)
    if group > target:
        aligned = math.lcm(step, LANES)
        divisors = [b for b in range(aligned, target + 1, aligned) if group % b == 0]
        return divisors[-1] if divisors else None
    if group:
        step = math.lcm(step, group)
    whole = -(-codes // step) * step
    if whole <= target:
        return whole
    step = math.lcm(step, LANES)
    if step > 2 * target:
        return None
    largest = max(step, min(target, -(-codes // step) * step))
    sizes = [b for b in range(step, largest + 1, step) if 2 * b >= largest]
    return min(sizes, key=lambda b: (-(-codes // b) * b, -b))


def prepack(
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    *,
    problem: _Problem,
    offsets: jax.Array | None = None,
) -> tuple:
    """Planes, scales, tables and offsets (only if they scale weights) as the kernel reads them."""
    config = problem.config
    planes = pack_planes(words, problem.padded_k, problem.padded_n, config.lookup)
    if not config.scale_weights:
        offsets = None
    return (
        planes,
        _tiled(scales, problem),
        tables(lut, problem.padded_n, config.lookup),
        None if offsets is None else _tiled(offsets, problem),
    )


def _tiled(scales: jax.Array, problem: _Problem) -> jax.Array:
    """Scales or offsets as ``[tiles along K, groups of a tile, padded N]``.

    The groups are padded to whole sublanes: XLA would otherwise lay out a stack of experts with
    these there, and bring them into the kernel's order in every call.
    """
    config = problem.config
    if problem.group > config.block_k:
        groups, rows = -(-problem.padded_k // problem.group), 1
    else:
        rows = config.block_k // problem.segment
        groups = problem.k_tiles * rows
    missing = groups - scales.shape[0], problem.padded_n - scales.shape[1]
    scales = jnp.pad(scales, ((0, missing[0]), (0, missing[1])))
    scales = scales.reshape(-1, rows, problem.padded_n)
    return scales if rows == 1 else jnp.pad(scales, ((0, 0), (0, -rows % 8), (0, 0)))


def unit_of_integers(problem: _Problem) -> int:
    """The distance of the integers that the kernel computes for neighbouring codes."""
    return 2 ** (8 - problem.bits) if problem.config.lookup == "int8" else 1


def untiled(scales: jax.Array, problem: _Problem) -> jax.Array:
    """The scales of :func:`prepack` as ``[groups, padded N]``, groups of padding at the end."""
    if problem.group <= problem.config.block_k:
        scales = scales[:, : problem.config.block_k // problem.segment]
    return scales.reshape(-1, problem.padded_n)


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
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``, or ``[M, N]`` when transposed."""
    problem = make_problem(
        x, words, lut, k=k, group_size=group_size, transpose=transpose, config=config
    )
    packed = prepack(words, scales, lut, problem=problem, offsets=offsets)
    y = apply(x, packed, problem, k=k, n=words.shape[-1], interpret=interpret)
    if not problem.config.scale_weights:
        y = add_offsets(y, x, offsets, k=k, group_size=group_size, transpose=transpose)
    return y.astype(x.dtype)


def make_problem(
    x: Any,
    words: Any,
    lut: Any,
    *,
    k: int,
    group_size: int,
    transpose: bool,
    config: Config | None = None,
    device_kind: str | None = None,
    computed: bool = False,
) -> _Problem:
    """Pads the sizes of a product to the tiles of ``config`` (None: a heuristic one).

    ``computed`` says that the entries are equally spaced, with zero in the middle. If the lookup is
    one of ``COMPUTED`` then, the kernel multiplies by integers, which are :func:`unit_of_integers`
    apart, and the result is to be multiplied by what one is in the table.
    """
    _, bits, n = words.shape
    p = lut.shape[-1]
    codes, group = -(-k // p), _group_codes(k, group_size, p)
    kind = device_kind or platforms.device_kind("tpu")
    config = config or default_config(
        x.shape[0],
        bits,
        codes=codes,
        group=group,
        n=n,
        dtype=x.dtype,
        per_channel=lut.shape[0] > 1,
        transpose=transpose,
        device_kind=kind,
        computed=computed,
    )
    padded_k = -(-codes // config.block_k) * config.block_k
    padded_n = -(-n // config.block_n) * config.block_n
    return _Problem(
        bits=bits,
        p=p,
        group=group or padded_k,
        padded_k=padded_k,
        padded_n=padded_n,
        config=config,
        transpose=transpose,
    )


def apply(
    x: jax.Array, packed: tuple, problem: _Problem, *, k: int, n: int, interpret: Any = False
) -> jax.Array:
    """Runs the kernel on prepacked operands; ``float32`` out."""
    m = x.shape[0]
    padded_m = -(-m // problem.config.block_m) * problem.config.block_m
    x = jnp.pad(x, ((0, padded_m - m), (0, 0)))
    return _call(x, packed, problem, k=k, n=n, interpret=interpret)[:m]


def apply_grouped(
    x: jax.Array,
    packed: tuple,
    problem: _Problem,
    groups: jax.Array,
    sizes: jax.Array,
    *,
    k: int,
    n: int,
    interpret: Any = False,
) -> jax.Array:
    """Runs the kernel on tiles of rows that each meet one entry of a stack of weights.

    Weights are read where they lie, and only those that a tile with rows meets.

    Args:
      x: ``[tiles, M, K]``.
      packed: As for ``apply``, with a leading axis of entries.
      problem: Of one tile; not transposed.
      groups: ``int32[tiles]``, the entry of each tile.
      sizes: ``int32[tiles]``, how many rows of a tile count; the others' results are of no meaning.
      k: The number of rows of a weight.
      n: The number of columns of a weight.
      interpret: Runs the kernel in interpret mode.

    Returns:
      ``float32[tiles, M, N]``.
    """
    tiles, m, _ = x.shape
    block_m = problem.config.block_m
    blocks = -(-m // block_m)  # of rows, in a tile
    x = jnp.pad(x, ((0, 0), (0, blocks * block_m - m), (0, 0)))
    rows = jnp.arange(blocks, dtype=jnp.int32)[None] * block_m < sizes[:, None]
    used = rows.reshape(-1).astype(jnp.int32)
    y = _call(
        x.reshape(-1, x.shape[-1]),
        packed,
        problem,
        k=k,
        n=n,
        interpret=interpret,
        entries=(jnp.repeat(groups.astype(jnp.int32), blocks), used),
    )
    return y.reshape(tiles, blocks * block_m, n)[:, :m]


def _call(
    x: jax.Array,
    packed: tuple,
    problem: _Problem,
    *,
    k: int,
    n: int,
    interpret: Any,
    entries: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The kernel for whole blocks of rows.

    With ``entries``, the weight has a leading axis; they are, for each block of rows, the entry
    that it meets and whether any of its rows counts.
    """
    planes, scales, table, offsets = packed
    config, p = problem.config, problem.p
    if x.dtype == jnp.float16:  # the matrix unit has none
        x = x.astype(jnp.float32)
    padded_m = x.shape[0]
    if problem.transpose:
        x = jnp.pad(x, ((0, 0), (0, problem.padded_n - n)))[None]
        k_axis, n_axis, x_width = 0, 2, config.block_n
        out_shape = (p, padded_m, problem.padded_k)
        out_block, x_index = config.block_k, n_axis
    else:
        x = jnp.pad(x, ((0, 0), (0, problem.padded_k * p - k)))
        x = x.reshape(padded_m, problem.padded_k, p).transpose(2, 0, 1)
        k_axis, n_axis, x_width = 2, 0, config.block_k
        out_shape = (1, padded_m, problem.padded_n)
        out_block, x_index = config.block_n, k_axis
    grid_k, grid_n = problem.k_tiles, problem.padded_n // config.block_n
    grid = (
        (grid_k, padded_m // config.block_m, grid_n)
        if problem.transpose
        else (grid_n, padded_m // config.block_m, grid_k)
    )
    per_scale = max(1, problem.group // config.block_k)  # tiles that share a row of scales
    single, shared = scales.shape[-3] == 1, table.shape[-1] == LANES

    def of_weight(block: tuple[int, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        """A block of the weight at ``index(k, n)``, of the entry that the block of rows meets."""
        if entries is None:
            return pl.BlockSpec(block, lambda *ids: index(ids[k_axis], ids[n_axis]))

        def within(*ids):
            groups, used = ids[3:]
            # Rows that do not count stay with one block, which is not read again for every k.
            along_k = jnp.where(used[ids[1]] > 0, ids[k_axis], 0)
            return groups[ids[1]], *index(along_k, ids[n_axis])

        return pl.BlockSpec((None, *block), within)

    plane_specs = [
        of_weight((config.block_k * b // 32, config.block_n), lambda k, n: (k, n))
        for b in PLANES[problem.bits]
    ]
    scale_spec = of_weight(
        (1, scales.shape[-2], config.block_n), lambda k, n: (0 if single else k // per_scale, 0, n)
    )
    table_spec = of_weight(
        (*table.shape[-3:-1], LANES if shared else config.block_n),
        lambda k, n: (0, 0, 0 if shared else n),
    )
    if entries is not None and not interpret:
        # Or XLA brings those of all entries into vector memory, though few may be met.
        in_hbm = functools.partial(pltpu.with_memory_space_constraint, memory_space=pltpu.HBM)
        planes, scales = tuple(map(in_hbm, planes)), in_hbm(scales)
    operands = [x, *planes, scales, table]
    specs = [
        pl.BlockSpec((x.shape[0], config.block_m, x_width), lambda *ids: (0, ids[1], ids[x_index])),
        *plane_specs,
        scale_spec,
        table_spec,
    ]
    if offsets is not None:
        operands.append(offsets)
        specs.append(scale_spec)
    if config.lookup == "byte":
        operands.append(jnp.asarray(byte_constants()))
        specs.append(pl.BlockSpec((3, ROWS, LANES), lambda *ids: (0, 0, 0)))
    y = pl.pallas_call(
        functools.partial(
            _kernel if entries is None else _grouped_kernel,
            problem=problem,
            planes=len(planes),
            offsets=offsets is not None,
            interpret=bool(interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if entries is None else 2,
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (out_shape[0], config.block_m, out_block), lambda *ids: (0, ids[1], ids[0])
            ),
        ),
        out_shape=shape_struct(out_shape, jnp.float32, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="lut_matmul",
    )(*(entries or ()), *operands)
    if problem.transpose:
        return y.transpose(1, 2, 0).reshape(padded_m, -1)[:, :k]
    return y[0, :, :n]


def _kernel(*refs, **static):
    _accumulate(pl.program_id(2) == 0, *refs, **static)


def _grouped_kernel(groups_ref, used_ref, *refs, **static):
    del groups_ref  # only the operands' places depend on them
    first = pl.program_id(2) == 0  # the interpreter knows it out here only

    @pl.when(used_ref[pl.program_id(1)] > 0)
    def _():
        _accumulate(first, *refs, **static)


def _accumulate(
    first: Any, x_ref, *refs, problem: _Problem, planes: int, offsets: bool, interpret: bool
):
    """Adds the products of one block along K, the first of which finds nothing."""
    plane_refs, (s_ref, t_ref, *rest) = refs[:planes], refs[planes:]
    config = problem.config
    offset_ref = rest.pop(0) if offsets else None
    constants: tuple = ()
    if config.lookup == "byte":
        c_ref = rest.pop(0)
        constants = tuple(c_ref[i] for i in range(3))
    (o_ref,) = rest
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    @pl.when(first)
    def _():
        o_ref[...] = jnp.zeros_like(o_ref)

    def weights(start: int, stop: int, value: int) -> jax.Array:
        columns = []
        for column in range(config.block_n // LANES):
            lanes = slice(column * LANES, (column + 1) * LANES)
            table = t_ref[value, :, lanes if t_ref.shape[-1] > LANES else slice(0, LANES)]
            pieces: list = []
            for row in range(start, stop, ROWS):
                pieces += lookup_rows(
                    plane_refs,
                    table,
                    constants,
                    bits=problem.bits,
                    row=row,
                    lanes=lanes,
                    lookup=config.lookup,
                    interpret=interpret,
                )
            columns.append(jnp.concatenate(pieces, axis=0))
        return jnp.concatenate(columns, axis=1)

    for value in range(problem.p):
        for start in range(0, config.block_k, problem.segment):
            group = start // problem.segment
            scale = s_ref[0, group : group + 1, :].astype(jnp.float32)
            total = None
            for chunk in range(start, start + problem.segment, _CHUNK):
                stop = min(chunk + _CHUNK, start + problem.segment)
                w = weights(chunk, stop, value)
                if config.scale_weights:
                    w = w.astype(jnp.float32) * scale
                    if offset_ref is not None:
                        w += offset_ref[0, group : group + 1, :].astype(jnp.float32)
                w = w.astype(x_ref.dtype)
                if problem.transpose:
                    o_ref[value, :, chunk:stop] += lax.dot_general(
                        x_ref[0],
                        w,
                        (((1,), (1,)), ((), ())),
                        precision=precision,
                        preferred_element_type=jnp.float32,
                    )
                    continue
                part = jnp.dot(
                    x_ref[value, :, chunk:stop],
                    w,
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                total = part if total is None else total + part
            if total is not None:
                o_ref[0] += total if config.scale_weights else total * scale
