"""The lookup-table product as a Mosaic GPU kernel for Hopper: few rows of activations.

More rows and the transposed product go to ``mosaic_gpu_tile``.

The transposed weight is the register operand of ``wgmma`` and is made by lookups in shared memory:
one byte permute and one load for two 4-bit codes. At 2 and 3 bits byte permutes of registers do
half of the lookups. A producer warpgroup streams words, activations and scales through shared
memory; each of the other warpgroups has its own columns of a step, and looks up the next tile of 64
columns while the tensor cores multiply the last one. The scale of a group multiplies the group's
sums.

One block runs on a multiprocessor for the whole product: the steps of all columns, one after the
other, are divided evenly among the blocks. A block that begins or ends within some columns leaves
a part of their sums; parts are added in a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import platforms
from pallas_kernels.lut_matmul import hopper, mosaic_gpu_asm, mosaic_gpu_tile, tuning
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.lut_matmul.mosaic_gpu_layout import (
    SLICE_K,
    TILE_N,
    bits_of_row,
    emulate,
    fill_lookup_table,
    lookup_table,
    pack_fragments,
    table_rows,
)
from pallas_kernels.manual_axes import shape_struct, vary_over, varying_axes

plgpu: Any = mosaic_gpu  # its interface moves with every release; see `mosaic_gpu_asm.available`

_DECODE_ROWS = 64
# Five warpgroups have 5 x 96 registers a lane slot, and the pipeline asks for 4 x 112 + 40 of them:
# the last one would wait forever.
_MOST_WARPGROUPS = 3
_PADDED_N = 2 * TILE_N  # a multiple of the columns of the smallest block


@dataclasses.dataclass(frozen=True)
class Config:
    """Warpgroups that multiply (at most 3), stages of the pipeline, and sizes of a step.

    A step is ``tiles`` times 64 columns for every warpgroup, by ``slices`` times 128 rows; all
    steps are divided among ``blocks`` blocks of the grid.
    """

    warpgroups: int
    stages: int
    tiles: int = 1
    slices: int = 1
    blocks: int = 132

    @property
    def block_k(self) -> int:
        """Rows of a step of the pipeline."""
        return self.slices * SLICE_K

    @property
    def block_n(self) -> int:
        """Columns of a step."""
        return self.warpgroups * self.tiles * TILE_N


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
    """None if the kernel can run these shapes and dtypes here, else the reason why not."""
    del offsets
    tables, _, p = lut.shape
    if bits_of_row(words, p) is None:
        return (
            f"{words.shape[1]}-bit codes for p={p} rows; the Hopper kernel has 2, 3, 4 and 8 bits "
            f"for one row, and 4, 6 and 8 for two"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations of {x.dtype}; the tensor cores take bfloat16 and float16"
    if tables > 1:
        return f"lut of shape {lut.shape}; the Hopper kernel takes one table for all columns"
    if scales.shape[0] > 1 and not (group_size in (16, 32, 64) or group_size % SLICE_K == 0):
        return (
            f"group_size={group_size}; use 16, 32, 64, a multiple of {SLICE_K} or one group a "
            f"column (group_size >= {k})"
        )
    if transpose:
        reason = reason_against_transposed(scales.shape[0], group_size)
        if reason is not None:
            return reason
    reason = mosaic_gpu_asm.available()
    if reason is not None:
        return reason
    kind = platforms.device_kind("cuda")
    if platforms.interpreting():
        if not hasattr(plgpu, "InterpretGPUParams"):
            return f"jax {jax.__version__} has no interpret mode for Mosaic GPU"
        return None
    if kind is None:
        return "no GPU is compiled for here"
    if not hopper.is_hopper(kind):
        return f"device {kind!r} is not of the Hopper generation (wgmma)"
    return None


def reason_against_transposed(groups: int, group_size: int) -> str | None:
    """Why the transposed product cannot have these groups, or None."""
    if groups == 1 or group_size >= TILE_N:
        return None
    return (
        f"the transposed product with group_size={group_size}; the Hopper kernel needs groups of "
        f"{TILE_N}, of a multiple of {SLICE_K} or of a column"
    )


def default_config(m: int, bits: int, *, n: int, k: int, group: int, tiles: int = 1) -> Config:
    """Wide steps where every block has several, and as many stages as shared memory holds.

    Several ``tiles``, which each meet a weight of their own, share the multiprocessors such that
    the busiest has about as little to do as possible.
    """
    n = -(-n // _PADDED_N) * _PADDED_N
    most = hopper.multiprocessors(platforms.device_kind("cuda"))
    # Steps of many rows leave the fewest parts, steps of many columns cost least.
    sizes = ((2, 1), (1, 2), (1, 1)) if tiles == 1 else ((1, 2), (2, 1), (1, 1))
    found = []
    for wide, slices in sizes if bits >= 4 else ((2, 2), *sizes):  # many codes in few bytes
        configs = [Config(2, stages, wide, slices, most) for stages in (4, 3, 2)]
        whole = n % configs[0].block_n == 0 and -(-k // SLICE_K) % slices == 0  # nothing to pad
        found += [config for config in configs if whole and _fits(m, bits, config, group)][:1]
    if tiles == 1:
        enough = (c for c in found if c.tiles == 1 or _steps(c, n=n, k=k) >= 4 * most)
        return next(enough)
    # Whole columns, which leave no parts to add, or a share of the multiprocessors for each tile
    # (but several blocks for it, as some tiles may be empty).
    shared = [
        dataclasses.replace(config, blocks=blocks)
        for config in found
        for blocks in (n // config.block_n, max(2, most // tiles))
    ]
    loads = [_load(config, n=n, k=k, tiles=tiles, most=most) for config in shared]
    return next(c for c, load in zip(shared, loads, strict=True) if load <= 1.1 * min(loads))


def _steps(config: Config, *, n: int, k: int) -> int:
    return -(-k // config.block_k) * -(-n // config.block_n)


def _load(config: Config, *, n: int, k: int, tiles: int, most: int) -> float:
    """What the busiest of ``most`` multiprocessors does, in times of 128 x 128 codes.

    Those take 425 clocks of shared memory. A step issues 135 instructions and 107 for each of them,
    in each of eight warps; to start a block costs about as much as five, to add parts as eight.
    """
    steps = _steps(config, n=n, k=k)
    steps_of_block = -(-steps // config.blocks)
    rounds = -(-(-(-steps // steps_of_block) * tiles) // most)
    codes = config.block_n * config.block_k / 128**2
    step = max(codes, 2 * (135 + 107 * codes) / 425)
    has_parts = steps_of_block % -(-k // config.block_k) != 0
    return rounds * (steps_of_block * step + 5) + 8 * has_parts


def _tuned(m: int, bits: int, *, k: int, n: int) -> Config | mosaic_gpu_tile.Config | None:
    kind = platforms.device_kind("cuda")
    found = tuning.lookup("mosaic_gpu", kind, bits=bits, m=m, k=k, n=n)
    if found is None or ("rows" in found) != (m > _DECODE_ROWS):
        return None
    return mosaic_gpu_tile.Config(**found) if m > _DECODE_ROWS else Config(**found)


def candidates(
    m: int, bits: int, *, k: int, n: int, group_size: int
) -> list[Config] | list[mosaic_gpu_tile.Config]:
    """Configurations worth timing, the heuristic one first."""
    if m > _DECODE_ROWS:
        return mosaic_gpu_tile.candidates(
            m, bits, group=group_size, columns=n, contracted=k, transpose=False
        )
    first = default_config(m, bits, n=n, k=k, group=group_size)
    others = [
        Config(warpgroups, stages, tiles, slices, first.blocks)
        for warpgroups in (2, _MOST_WARPGROUPS, 1)
        for tiles, slices in ((4, 1), (2, 2), (2, 1), (1, 4), (1, 2))
        for stages in (2, 3, 4, 6)
        if k % (slices * SLICE_K) == 0
        and _fits(m, bits, Config(warpgroups, stages, tiles, slices), group_size)
    ]
    columns, steps = -(-n // first.block_n), -(-k // first.block_k)
    blocks = -(-columns // -(-columns // first.blocks))
    if -(-columns * steps // blocks) % steps == 0:  # no columns are divided: no parts to add
        others.insert(0, dataclasses.replace(first, blocks=blocks))
    return list(dict.fromkeys([first, *others]))


def _fits(m: int, bits: int, config: Config, group: int) -> bool:
    """Whether shared memory holds the stages, and a thread's registers what it works on.

    The registers are what ahead-of-time compilation shows that has no spills and lets products
    overlap: the sums and, with several tiles, the products of all groups of a step (with several
    slices half of them, at most six), half a register a row; and the rest.
    """
    rows = _block_m(m)
    scales = max(1, config.block_k // group) * config.block_n * 4  # float32, the widest
    words = config.block_n * config.block_k * bits // 8
    stage = words + rows * config.block_k * 2 + scales + 1536
    fixed = table_rows(bits) * 256 + config.warpgroups * TILE_N * rows * 4
    products = config.tiles * config.slices * max(1, SLICE_K // group)
    held, rest = (products, 76) if config.tiles > 1 else (2, 108)
    if config.slices > 1:
        held = max(held, min(products // 2, 6))
    registers = (512 - hopper.MEMORY_REGISTERS) // config.warpgroups
    needed = (config.tiles + held) * rows // 2 + rest
    return fixed + config.stages * stage <= hopper.SHARED_MEMORY and needed <= registers


def _block_m(m: int) -> int:
    """Rows of ``x`` of a block, which holds all of them."""
    return -(-m // 8) * 8


@dataclasses.dataclass(frozen=True)
class _Problem:
    bits: int  # a row
    p: int  # rows that share a code
    group: int  # rows that share a scale; padded_k for a column
    m: int
    block_m: int
    padded_k: int
    padded_n: int
    config: Config

    @property
    def steps(self) -> int:
        """Steps of a block's columns."""
        return self.padded_k // self.config.block_k

    @property
    def column_blocks(self) -> int:
        """Blocks of columns; the last one may reach beyond the words, where copies are cut."""
        return -(-self.padded_n // self.config.block_n)

    @property
    def all_steps(self) -> int:
        """Steps of all columns."""
        return self.steps * self.column_blocks

    @property
    def steps_of_block(self) -> int:
        """Steps that a block of the grid takes; the last block may have fewer."""
        return -(-self.all_steps // self.config.blocks)

    @property
    def scale_rows(self) -> int:
        """Rows of scales in a step."""
        return max(1, self.config.block_k // self.group)

    def first_block(self, column: Any) -> Any:
        """The block of the grid that takes the first step of a block of columns."""
        return column * self.steps // self.steps_of_block

    def parts(self) -> np.ndarray:
        """``bool[parts, column blocks]``: which parts of the sums are written."""
        columns = np.arange(self.column_blocks)
        last_block = ((columns + 1) * self.steps - 1) // self.steps_of_block
        counts = last_block - self.first_block(columns) + 1
        return np.arange(np.max(counts))[:, None] < counts


def make_problem(
    m: int,
    words: Any,
    *,
    k: int,
    group_size: int,
    p: int = 1,
    config: Config | mosaic_gpu_tile.Config | None = None,
    padded: tuple[int, int] | None = None,
    transpose: bool = False,
    tiles: int = 1,
) -> _Problem | mosaic_gpu_tile.Problem:
    """Pads the sizes of a product to the tiles of ``config`` (None: a tuned or heuristic one).

    ``p`` rows share a code. ``padded`` is the K and N of words that are packed already; tiles then
    divide those. ``tiles`` of ``m`` rows each meet a weight of their own.
    """
    bits, n = words.shape[1] // p, words.shape[2]
    if config is None and not transpose and tiles == 1:
        config = _tuned(m, bits, k=k, n=n)
    if transpose or m > _DECODE_ROWS:
        assert not isinstance(config, Config), "many rows take a mosaic_gpu_tile.Config"
        padded = padded or (-(-k // SLICE_K) * SLICE_K, -(-n // _PADDED_N) * _PADDED_N)
        return mosaic_gpu_tile.make_problem(
            m,
            bits,
            k=k,
            group_size=group_size,
            padded=padded,
            transpose=transpose,
            tiles=tiles,
            config=config,
        )
    assert not isinstance(config, mosaic_gpu_tile.Config), "few rows take a Config"
    config = config or default_config(m, bits, n=n, k=k, group=group_size, tiles=tiles)

    if padded is None:
        padded = (-(-k // config.block_k) * config.block_k, -(-n // _PADDED_N) * _PADDED_N)

    def fits(candidate: Config) -> bool:
        block = candidate.block_k  # holds whole groups, or a group holds whole blocks
        aligned = group_size >= k or 0 in (group_size % block, block % group_size)
        return aligned and padded[0] % block == 0

    slices = range(config.slices, 0, -1)
    config = next(filter(fits, (dataclasses.replace(config, slices=s) for s in slices)))
    return _Problem(
        bits=bits,
        p=p,
        group=padded[0] if group_size >= k else group_size,
        m=m,
        block_m=_block_m(m),
        padded_k=padded[0],
        padded_n=padded[1],
        config=config,
    )


def prepack(
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    problem: _Problem | mosaic_gpu_tile.Problem,
    dtype: Any,
) -> tuple:
    """Words in fragments, scales for all of them, and the table of bytes."""
    planes = pack_fragments(words, problem.padded_k, problem.padded_n, lut.shape[2])
    groups = -(-problem.padded_k // problem.group)
    scales = jnp.pad(
        scales, ((0, groups - scales.shape[0]), (0, problem.padded_n - scales.shape[1]))
    )
    return planes, scales, lookup_table(lut, problem.bits, dtype)


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
    config: Config | mosaic_gpu_tile.Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``, or ``[M, N]`` when transposed."""
    if interpret and config is None:
        # An interpreted thread may block a core for good, and small machines have two.
        m = x.shape[0]
        if transpose or m > _DECODE_ROWS:
            config = mosaic_gpu_tile.Config(min(_block_m(m), 128), 1, stages=2, cluster=1)
        else:
            config = Config(warpgroups=2, stages=2, blocks=3)
    problem = make_problem(
        x.shape[0],
        words,
        k=k,
        group_size=group_size,
        p=lut.shape[2],
        config=config,
        transpose=transpose,
    )
    packed = prepack(words, scales, lut, problem, x.dtype)
    out_dtype = x.dtype if offsets is None else jnp.float32
    y = apply(x, packed, problem, out_dtype=out_dtype, interpret=interpret)
    y = y[:, : k if transpose else words.shape[2]]
    y = add_offsets(y, x, offsets, k=k, group_size=group_size, transpose=transpose)
    return y.astype(x.dtype)


def apply(
    x: jax.Array,
    packed: tuple,
    problem: _Problem | mosaic_gpu_tile.Problem,
    *,
    out_dtype: Any = jnp.float32,
    interpret: Any = False,
) -> jax.Array:
    """Runs the kernel on what :func:`prepack` made; ``out_dtype[M, padded N]``, K if transposed."""
    m, rows = x.shape[0], _rows(problem)
    x = jnp.pad(x, ((0, -m % rows), (0, 0)))
    return _call(x, packed, problem, out_dtype=out_dtype, interpret=interpret)[:m]


def apply_grouped(
    x: jax.Array,
    packed: tuple,
    problem: _Problem | mosaic_gpu_tile.Problem,
    groups: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any = jnp.float32,
    interpret: Any = False,
) -> jax.Array:
    """Runs the kernel on tiles of rows that each meet one entry of a stack of weights.

    Weights are read where they lie, and only those that a tile with rows meets.

    Args:
      x: ``[tiles, M, K]``.
      packed: As for :func:`apply`, with a leading axis of entries.
      problem: Of one of the tiles; not transposed.
      groups: ``int32[tiles]``, the entry of each tile.
      sizes: ``int32[tiles]``, how many rows of a tile count; the others' results are of no meaning.
      out_dtype: Of the result.
      interpret: Runs the kernel in interpret mode.

    Returns:
      ``out_dtype[tiles, M, padded N]``.
    """
    m, rows = x.shape[1], _rows(problem)
    x = jnp.pad(x, ((0, 0), (0, -m % rows), (0, 0)))
    starts = jnp.arange(0, x.shape[1], rows, dtype=jnp.int32)  # of the kernel's blocks of rows
    counts = starts[None] < sizes[:, None].astype(jnp.int32)
    entries = jnp.where(counts, groups[:, None].astype(jnp.int32), -1).reshape(-1)
    y = _call(
        x.reshape(-1, x.shape[2]),
        packed,
        problem,
        out_dtype=out_dtype,
        interpret=interpret,
        entries=entries,
    )
    return y.reshape(*x.shape[:2], -1)[:, :m]


def _rows(problem: _Problem | mosaic_gpu_tile.Problem) -> int:
    """Rows of ``x`` of a block of the kernel."""
    return problem.block_m if isinstance(problem, _Problem) else problem.config.rows


def _call(
    x: jax.Array,
    packed: tuple,
    problem: _Problem | mosaic_gpu_tile.Problem,
    *,
    out_dtype: Any,
    interpret: Any,
    entries: jax.Array | None = None,
) -> jax.Array:
    """The kernel for whole blocks of rows; with ``entries``, see ``mosaic_gpu_tile.of_entries``."""
    if isinstance(problem, mosaic_gpu_tile.Problem):
        return mosaic_gpu_tile.apply(
            x, packed, problem, out_dtype=out_dtype, interpret=interpret, entries=entries
        )
    planes, scales, table = packed
    x = jnp.pad(x, ((0, 0), (0, problem.padded_k - x.shape[1])))
    # a copy has at most 256 elements along an axis
    scales = scales.reshape(*scales.shape[:-1], -1, TILE_N)
    config, parts = problem.config, problem.parts()
    dtype = out_dtype if len(parts) == 1 else jnp.float32
    options: dict[str, Any] = {}
    if interpret:
        params = plgpu.InterpretGPUParams() if interpret is True else interpret
        options["interpret"] = params
    body = functools.partial(
        _kernel, problem=problem, dtype=x.dtype, planes=len(planes), interpret=bool(interpret)
    )
    kernel = plgpu.kernel(
        body if entries is None else mosaic_gpu_tile.of_entries(body, len(planes)),
        out_type=shape_struct((len(parts), x.shape[0], problem.padded_n), dtype, x),
        scratch_types=[
            plgpu.SMEM((table_rows(problem.bits), 64), jnp.uint32),
            mosaic_gpu_asm.staging(config.warpgroups, problem.block_m, dtype),
            plgpu.Barrier(num_arrivals=config.warpgroups),
            # the interpreter has no register operands
            *([plgpu.SMEM((config.warpgroups, TILE_N, SLICE_K), x.dtype)] if interpret else []),
        ],
        grid=(-(-problem.all_steps // problem.steps_of_block), x.shape[0] // problem.block_m),
        grid_names=("block", "m"),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        **options,
    )
    y = kernel(*(() if entries is None else (entries,)), *planes, x, scales, table)
    y = vary_over(y, varying_axes(x))  # which JAX 0.10 forgets
    if len(parts) == 1:
        return y[0]
    written = np.repeat(parts, config.block_n, axis=1)[:, None, : problem.padded_n]
    return jnp.sum(jnp.where(written, y, 0), axis=0).astype(out_dtype)


def _kernel(*refs, problem: _Problem, dtype: Any, planes: int, interpret: bool):
    plane_refs, refs = refs[:planes], refs[planes:]
    x_ref, s_ref, t_ref, o_ref, table, staged, barrier, *operand = refs
    config, bits, block_m = problem.config, problem.bits, problem.block_m
    layout = plgpu.Layout
    warpgroup, tile_m = lax.axis_index("warpgroup"), lax.axis_index("m")
    byte_planes = () if interpret else mosaic_gpu_asm.load_byte_planes(t_ref, bits, problem.p)
    group = min(problem.group, SLICE_K)
    block, share = lax.axis_index("block"), problem.steps_of_block
    # a part of a tile whose rows share a scale: (tile, slice, first row of the slice)
    units = [
        (tile, piece, start)
        for tile in range(config.tiles)
        for piece in range(config.slices)
        for start in range(0, SLICE_K, group)
    ]

    def place(step: Any) -> tuple:
        """The block of columns and the rows' block of a step of this block."""
        step = jnp.minimum(block * share + step, problem.all_steps - 1)
        return step // problem.steps, step % problem.steps

    def zeros() -> Any:
        return plgpu.layout_cast(jnp.zeros((TILE_N, block_m), jnp.float32), layout.WGMMA)

    def load_words(refs: list, tile: int, piece: int) -> tuple:
        return mosaic_gpu_asm.load_words(refs, bits, warpgroup * config.tiles + tile, piece)

    def dequantize(words: tuple, start: int) -> Any:
        steps = range(start // 16, (start + group) // 16)
        if not interpret:
            return mosaic_gpu_asm.dequantize(
                words, table, byte_planes, bits=bits, steps=steps, dtype=dtype
            )
        plgpu.wgmma_wait(0)
        weight = operand[0].at[warpgroup, :, pl.ds(0, group)]
        weight[...] = emulate(words, table[...], bits, steps, dtype)
        return weight

    def load_scale(s_smem: Any, unit: tuple) -> Any:
        tile, piece, start = unit
        row = (piece * SLICE_K + start) // problem.group if problem.scale_rows > 1 else 0
        ref = s_smem.at[row, warpgroup * config.tiles + tile]
        scale = mosaic_gpu_asm.load(ref, layout.WGMMA.reduce(1)).astype(jnp.float32)
        scale = lax.broadcast_in_dim(scale, (TILE_N, block_m), (0,))
        return plgpu.layout_cast(scale, layout.WGMMA)

    def multiply(index, *args):
        *word_refs, x_smem, s_smem, totals = args

        def all_units(*products):
            """Looks up the next unit and adds the last one while the tensor cores multiply one."""
            sums = list(totals)
            scales = [load_scale(s_smem, unit) for unit in units]
            words = load_words(word_refs, *units[0][:2])
            weight = dequantize(words, 0)
            for i, (_, piece, start) in enumerate(units):
                coming = units[i + 1] if i + 1 < len(units) else None
                if coming is not None and coming[2] == 0:
                    words = load_words(word_refs, *coming[:2])
                rows = x_smem.at[:, pl.ds(piece * SLICE_K + start, group)]
                plgpu.wgmma(products[i], weight, mosaic_gpu_asm.transposed(rows))
                if i:
                    last = plgpu.wgmma_accumulator_load(products[i - 1], wait_n=1)
                    sums[units[i - 1][0]] += last * scales[i - 1]
                if coming is not None:
                    weight = dequantize(words, coming[2])
            sums[units[-1][0]] += products[-1][...] * scales[-1]
            return tuple(sums)

        accumulators = [plgpu.ACC((TILE_N, block_m), jnp.float32)] * len(units)
        return finish(index[0], list(pl.run_scoped(all_units, *accumulators)))

    def finish(step: Any, totals: list) -> tuple:
        """Writes the sums after the last step of a block's columns, or of the block."""
        column, row = place(step)
        inside = block * share + step < problem.all_steps

        def write() -> tuple:
            part = block - problem.first_block(column)
            for tile in range(config.tiles):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last copy has left it
                own = staged.at[warpgroup]
                mosaic_gpu_asm.stage(own, totals[tile])
                first = column * config.block_n + (warpgroup * config.tiles + tile) * TILE_N
                rows = pl.ds(tile_m * block_m, block_m)
                plgpu.copy_smem_to_gmem(own, o_ref.at[part, rows, pl.ds(first, TILE_N)])
            return tuple(zeros() for _ in totals)

        ends = inside & ((row == problem.steps - 1) | (step == share - 1))
        return lax.cond(ends, write, lambda: tuple(totals))

    def compute(pipeline):
        if interpret:
            fill_lookup_table(table, t_ref)
        else:
            mosaic_gpu_asm.fill_table(table, t_ref, bits=bits, warpgroups=config.warpgroups)
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        pipeline((zeros(),) * config.tiles)
        plgpu.wait_smem_to_gmem(0)

    per_scale = max(1, problem.group // config.block_k)
    tile_k = min(group, 64)  # a group's rows of x must be whole tiles
    in_specs = [
        plgpu.BlockSpec(
            (config.warpgroups * config.tiles, config.slices, *ref.shape[2:]),
            lambda step: (*place(step), 0, 0),
        )
        for ref in plane_refs
    ]
    in_specs += [
        plgpu.BlockSpec(
            (block_m, config.block_k),
            lambda step: (tile_m, place(step)[1]),
            transforms=(plgpu.TilingTransform((8, tile_k)), plgpu.SwizzleTransform(2 * tile_k)),
        ),
        plgpu.BlockSpec(
            (problem.scale_rows, config.block_n // TILE_N, TILE_N),
            lambda step: (place(step)[1] // per_scale, place(step)[0], 0),
        ),
    ]
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(share,),
        memory_registers=hopper.MEMORY_REGISTERS,
        in_specs=in_specs,
        max_concurrent_steps=min(config.stages, share),
        wg_axis="warpgroup",
        num_compute_wgs=config.warpgroups,
        compute_context=compute,
    )(*plane_refs, x_ref, s_ref)
