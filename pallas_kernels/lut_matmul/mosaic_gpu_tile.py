"""The Hopper kernel for many rows of activations, and for the transposed product.

Like the decoding kernel (``mosaic_gpu``) it makes the weight by lookups in shared memory as the
register operand of ``wgmma``. With many rows a block's sums fill the registers, so no second set
of sums can be kept for a group: the scales multiply the looked-up values instead, which are rounded
to the activations' dtype as a dense weight of that dtype would be. One product is in flight while
the next part of the weight is looked up. Blocks of a cluster that share rows of ``x`` load them
once. Sums are taken in a fixed order: the same inputs give the same bits.

The transposed product ``x @ W.T`` reads the same words: a warp takes those of 16 rows k and, block
after block, of 16 columns n, and transposes the 8 x 8 matrices of its registers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import platforms
from pallas_kernels.lut_matmul import hopper, mosaic_gpu_asm
from pallas_kernels.lut_matmul.mosaic_gpu_layout import (
    SLICE_K,
    TILE_N,
    emulate,
    fill_lookup_table,
    table_rows,
)
from pallas_kernels.manual_axes import shape_struct, vary_over, varying_axes

plgpu: Any = mosaic_gpu

_WARPGROUPS = 2
_PART = 64  # rows or columns that are looked up at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """The tiles of one product.

    A block is ``rows`` of ``x`` by ``tiles`` times 128 columns of the result; ``cluster`` blocks
    share rows of ``x``, and the contraction is split into ``splits`` parts.
    """

    rows: int
    tiles: int
    stages: int
    splits: int = 1
    cluster: int = 2

    @property
    def block_n(self) -> int:
        """Columns of a block."""
        return _WARPGROUPS * self.tiles * TILE_N


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of one product; ``group`` rows share a scale, ``padded_k`` for a column."""

    bits: int
    group: int
    m: int
    padded_k: int
    padded_n: int
    transpose: bool
    config: Config

    @property
    def contracted(self) -> int:
        """Length of the sums."""
        return self.padded_n if self.transpose else self.padded_k

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.padded_k if self.transpose else self.padded_n

    @property
    def steps(self) -> int:
        """Steps of the pipeline of a block."""
        return self.contracted // SLICE_K // self.config.splits

    @property
    def span(self) -> int:
        """Rows of the weight that one load of scales covers."""
        return self.config.block_n if self.transpose else SLICE_K

    @property
    def scale_rows(self) -> int:
        """Rows of scales of a step."""
        return max(1, self.span // self.group)


def clocks(
    m: int, bits: int, config: Config, *, columns: int, contracted: int, tiles: int = 1
) -> float:
    """Estimated time in clocks of a multiprocessor: what no measurement has yet confirmed.

    A block takes the longest of the tensor cores (2048 products a clock), shared memory (128
    bytes: the activations that wgmma reads and their copy, lookups, words), loads through the
    second-level cache (24 bytes) and issued instructions (128, 2.4 a code). The words, and the
    parts of a split contraction, go through memory (2700 bytes for all multiprocessors).
    """
    rows, block_n = config.rows, config.block_n
    fill = 2 * rows
    words = block_n * bits / 8
    step = max(
        rows * block_n / 2048,
        (block_n / 64 * 2 * rows + 2 * block_n + 2 * words + fill) / 128,
        (fill / config.cluster + words) / 24,
        2.4 * block_n / 128,
    )
    blocks = -(-columns // block_n) * -(-m // rows) * config.splits * tiles
    waves = -(-blocks // hopper.multiprocessors(platforms.device_kind("cuda")))
    streamed = tiles * columns * contracted * bits / 8 / 2700
    parts = 8 * config.splits * tiles * m * columns / 2700 if config.splits > 1 else 0
    return max(waves * contracted / config.splits * step, streamed) + 2000 * waves + parts


def candidates(
    m: int,
    bits: int,
    *,
    group: int,
    columns: int,
    contracted: int,
    transpose: bool,
    tiles: int = 1,
) -> list[Config]:
    """Configurations that fit, the one of the smallest estimate first."""
    steps = contracted // SLICE_K
    # Blocks of at most 64, 96 and 128 rows, as equal as whole tiles for two loads allow.
    unit = 8 if m <= 8 else 16
    rows = {-(-m // (unit * -(-m // most))) * unit for most in (64, 96, 128)}
    found = [
        Config(r, wide, stages, splits, cluster)
        for r in sorted(rows)
        for wide in (1, 2)
        for stages in (6, 5, 4, 3)
        for splits in range(1, 9)
        for cluster in (2, 1)
        if r % (8 * cluster) == 0  # each block of a cluster loads whole rows of tiles
        and steps % splits == 0
        and _fits(bits, Config(r, wide, stages), group)
        and (not transpose or 0 in (group % (128 * wide), 128 * wide % group))
    ]
    sizes = {"columns": columns, "contracted": contracted, "tiles": tiles}
    return sorted(found, key=lambda config: clocks(m, bits, config, **sizes))


def _fits(bits: int, config: Config, group: int) -> bool:
    scales = max(1, SLICE_K // group) * config.block_n * 4  # float32, the widest
    words = config.block_n * SLICE_K * bits // 8
    stage = words + config.rows * SLICE_K * 2 + max(scales, 2048) + 2048
    fixed = max(table_rows(bits) * 256, _WARPGROUPS * TILE_N * config.rows * 4)
    return fixed + config.stages * stage <= hopper.SHARED_MEMORY


def make_problem(
    m: int,
    bits: int,
    *,
    k: int,
    group_size: int,
    padded: tuple[int, int],
    transpose: bool = False,
    tiles: int = 1,
    config: Config | None = None,
) -> Problem:
    """The product of ``m`` rows with words that are padded to ``padded`` = (K, N).

    ``tiles`` is how many of them there are, each with a weight of its own.
    """
    padded_k, padded_n = padded
    columns, contracted = (padded_k, padded_n) if transpose else (padded_n, padded_k)
    group = padded_k if group_size >= k else group_size
    if config is None:
        sizes = {"group": group, "columns": columns, "contracted": contracted, "tiles": tiles}
        config = candidates(m, bits, **sizes, transpose=transpose)[0]
    return Problem(bits, group, m, padded_k, padded_n, transpose, config)


def of_entries(kernel: Callable[..., None], planes: int) -> Callable[..., None]:
    """The same kernel for blocks of rows that each meet one entry of a stack of weights.

    It takes ``int32[blocks of rows]`` first, the entry of each block or -1 for no work.
    """

    def run(entries_ref, *refs):
        entry = entries_ref[lax.axis_index("m")]
        words, (x, scales, table, *rest) = refs[:planes], refs[planes:]

        @pl.when(entry >= 0)
        def _():
            own = [ref.at[entry] for ref in (*words, scales, table)]
            kernel(*own[:planes], x, *own[planes:], *rest)

    return run


def apply(
    x: jax.Array,
    packed: tuple,
    problem: Problem,
    *,
    out_dtype: Any,
    interpret: Any = False,
    entries: jax.Array | None = None,
) -> jax.Array:
    """Runs the kernel on prepacked operands and whole blocks of rows.

    Returns:
      ``out_dtype[M, padded N]``, or K when transposed.
    """
    planes, scales, table = packed
    config, splits = problem.config, problem.config.splits
    x = jnp.pad(x, ((0, 0), (0, problem.contracted - x.shape[1])))
    kernel_dtype = jnp.float32 if splits > 1 else out_dtype
    table_type = plgpu.SMEM((table_rows(problem.bits), 64), jnp.uint32)
    result_type = mosaic_gpu_asm.staging(_WARPGROUPS, config.rows, kernel_dtype)
    options: dict[str, Any] = {}
    scratch: list[Any]
    if interpret:
        params = plgpu.InterpretGPUParams() if interpret is True else interpret
        options["interpret"] = params
        # the interpreter has neither unions nor register operands
        scratch = [table_type, result_type, plgpu.SMEM((_WARPGROUPS, TILE_N, SLICE_K), x.dtype)]
    else:  # the result takes the place of the table
        scratch = [plgpu.RefUnion(table_type, result_type)]
    columns = -(-problem.columns // config.block_n)
    body = functools.partial(
        _kernel, problem=problem, dtype=x.dtype, planes=len(planes), interpret=bool(interpret)
    )
    kernel = plgpu.kernel(
        body if entries is None else of_entries(body, len(planes)),
        out_type=shape_struct((splits, x.shape[0], problem.columns), kernel_dtype, x),
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=_WARPGROUPS)],
        grid=(splits, -(-columns // config.cluster), x.shape[0] // config.rows),
        grid_names=("split", "n", "m"),
        cluster=(config.cluster,),
        cluster_names=("pair",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        **options,
    )
    y = kernel(*(() if entries is None else (entries,)), *planes, x, scales, table)
    y = vary_over(y, varying_axes(x))  # which JAX 0.10 forgets
    return y[0] if splits == 1 else jnp.sum(y, axis=0).astype(out_dtype)


def _kernel(*refs, problem: Problem, dtype: Any, planes: int, interpret: bool):
    plane_refs, (x_ref, s_ref, t_ref, o_ref, *scratch) = refs[:planes], refs[planes:]
    if interpret:
        table, result, operand, barrier = scratch
    else:
        (table, result), barrier = scratch
    config, bits, transpose = problem.config, problem.bits, problem.transpose
    layout = plgpu.Layout
    split, tile_m = lax.axis_index("split"), lax.axis_index("m")
    tile_n = lax.axis_index("n") * config.cluster + lax.axis_index("pair")
    warpgroup = lax.axis_index("warpgroup")
    part = _PART if transpose else min(problem.group, _PART)

    def meet():
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def forward_words(refs, tile: int) -> tuple:
        return mosaic_gpu_asm.load_words(refs, bits, warpgroup * config.tiles + tile, 0)

    def looked_up(words, refs, tile: int, start: int) -> Any:
        """Table values of 64 columns of the result and ``part`` terms of its sums."""
        if not transpose:
            steps = range(start // 16, (start + part) // 16)
            if interpret:
                return emulate(words, table[...], bits, steps, dtype)
            return mosaic_gpu_asm.dequantize(words, table, bits=bits, steps=steps, dtype=dtype)
        index = warpgroup * config.tiles + tile  # of 64 columns of the result, two in a slice
        block = [ref.at[start // TILE_N, index // 2] for ref in refs]
        half = None if config.tiles == 1 else tile
        if interpret:
            words = tuple(ref[...] for ref in block)
            weight = emulate(words, table[...], bits, range(8), dtype).T
            return lax.dynamic_slice_in_dim(weight, 64 * (index % 2), 64)
        return mosaic_gpu_asm.dequantize_transposed(block, table, bits=bits, half=half, dtype=dtype)

    def scale_of(s_smem, tile: int, start: int) -> Any:
        """Scales of the looked-up values, in their shape and layout."""
        first = (warpgroup * config.tiles + tile) * TILE_N
        row: Any = 0
        if problem.scale_rows > 1:
            row = (first if transpose else start) // problem.group
        # the axis that one scale is repeated along, and the place of the others
        repeated, place = (0, pl.ds(start, part)) if transpose else (1, pl.ds(first, TILE_N))
        scale = mosaic_gpu_asm.load(s_smem.at[row, place], layout.WGMMA.reduce(repeated))
        return lax.broadcast_in_dim(scale, (TILE_N, part), (1 - repeated,))

    def multiply(index, *args):
        del index
        *word_refs, x_smem, s_smem, sums = args
        words = [() if transpose else forward_words(word_refs, t) for t in range(config.tiles)]
        for start in range(0, SLICE_K, part):
            for tile in range(config.tiles):
                weight = looked_up(words[tile], word_refs, tile, start)
                scale = scale_of(s_smem, tile, start)
                if scale.dtype == dtype:  # one rounding, of the exact product
                    weight = weight * scale
                else:
                    weight = weight.astype(jnp.float32) * scale.astype(jnp.float32)
                    weight = weight.astype(dtype)
                if interpret:
                    plgpu.wgmma_wait(0)
                    lent = operand.at[warpgroup, :, pl.ds(0, part)]
                    lent[...] = weight
                    weight = lent
                rows = x_smem.at[:, pl.ds(start, part)]
                plgpu.wgmma(sums[tile], weight, mosaic_gpu_asm.transposed(rows))
                plgpu.wgmma_wait(1)
        return sums

    def compute(pipeline):
        if interpret:
            fill_lookup_table(table, t_ref)
        else:
            mosaic_gpu_asm.fill_table(table, t_ref, bits=bits, warpgroups=_WARPGROUPS)
        meet()

        def with_sums(*sums):
            pipeline(sums)
            values = [s[...].astype(o_ref.dtype) for s in sums]
            meet()  # nobody reads the table any more
            own = result.at[warpgroup]
            for tile, value in enumerate(values):
                mosaic_gpu_asm.stage(own, value)
                first = tile_n * config.block_n + (warpgroup * config.tiles + tile) * TILE_N
                rows = pl.ds(tile_m * config.rows, config.rows)
                plgpu.copy_smem_to_gmem(own, o_ref.at[split, rows, pl.ds(first, TILE_N)])
                plgpu.wait_smem_to_gmem(0)

        shape = (TILE_N, config.rows)
        pl.run_scoped(with_sums, *[plgpu.ACC(shape, jnp.float32)] * config.tiles)

    # Blocks of the operands. The words have axes (N / 64, K / 128), the scales (groups, N).
    # A slot is released a step late, by two threads and without a barrier of the warpgroup. All of
    # it has read the slot then, as it has issued a product of the step after, which is waited for.
    delay = min(1, problem.steps - 1)
    first_step = split * problem.steps
    per_scale = max(1, problem.group // problem.span)
    if transpose:
        word_block = SLICE_K // TILE_N, config.block_n // SLICE_K
        scale_block = problem.scale_rows, SLICE_K
        word_index = lambda k: (first_step + k, tile_n, 0, 0)  # noqa: E731
        scale_index = lambda k: (tile_n // per_scale, first_step + k)  # noqa: E731
    else:
        word_block = config.block_n // TILE_N, 1
        scale_block = problem.scale_rows, config.block_n
        word_index = lambda k: (tile_n, first_step + k, 0, 0)  # noqa: E731
        scale_index = lambda k: ((first_step + k) // per_scale, tile_n)  # noqa: E731
    in_specs = [
        plgpu.BlockSpec((*word_block, *ref.shape[2:]), word_index, delay_release=delay)
        for ref in plane_refs
    ]
    in_specs += [
        plgpu.BlockSpec(
            (config.rows, SLICE_K),
            lambda k: (tile_m, first_step + k),
            transforms=(plgpu.TilingTransform((8, part)), plgpu.SwizzleTransform(2 * part)),
            collective_axes=("pair",) if config.cluster > 1 else (),
            delay_release=delay,
        ),
        plgpu.BlockSpec(scale_block, scale_index, delay_release=delay),
    ]
    plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(problem.steps,),
        memory_registers=hopper.MEMORY_REGISTERS,
        in_specs=in_specs,
        max_concurrent_steps=min(config.stages, problem.steps),
        wg_axis="warpgroup",
        num_compute_wgs=_WARPGROUPS,
        compute_context=compute,
    )(*plane_refs, x_ref, s_ref)
