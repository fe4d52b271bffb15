"""Weights in a kernel's own layout, made once at load time.

The canonical words are what is saved and sharded; a kernel reorders them in every call unless they
were prepacked, which costs about one pass over the packed weight.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import dispatch
from pallas_kernels.lut_matmul.api import lut_matmul
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.lut_matmul.reference import dequantize
from pallas_kernels.manual_axes import vary_over, varying_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight ``[K, N]`` that one implementation reads without reordering.

    Attributes:
      planes: Packed codes in the implementation's layout (canonical words for those without one).
      scales: ``[ceil(K / G), N]``, or the implementation's form of them.
      table: ``float32[T, 2**bits, p]``, or the implementation's form of it.
      lut: ``[T, 2**bits, p]`` that ``scales`` are for; :func:`packed_columns` reads it.
      offsets: ``[ceil(K / G), N]``, or None.
      implementation: Whose layout it is.
      dtype: Of the activations; a table may be stored in it.
      k: The number of rows K.
      n: The number of columns N.
      bits: Bits a code.
      group_size: Rows that share a scale.
      p: Rows that share a code.
      padded: K and N that the planes were padded to, and what decided their order.
    """

    planes: tuple
    scales: jax.Array
    table: jax.Array
    lut: jax.Array
    offsets: jax.Array | None
    implementation: str = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})
    n: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    group_size: int = dataclasses.field(metadata={"static": True})
    p: int = dataclasses.field(metadata={"static": True})
    padded: tuple = dataclasses.field(metadata={"static": True})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Axes that all arrays lead with, which ``jax.vmap`` over :func:`prepack` makes."""
        own = 3 if self.implementation == "mosaic_tpu" else 2
        return self.scales.shape[:-own]


def prepack(
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None = None,
    *,
    k: int,
    group_size: int,
    implementation: str,
    dtype: Any = jnp.bfloat16,
    device_kind: str | None = None,
    zero: int | None = None,
) -> PackedWeight:
    """Reorders a weight for an implementation and the dtype of its activations.

    Args:
      words: ``uint8[ceil(K / (8 p)), bits, N]``, see :mod:`pallas_kernels.layout`.
      scales: ``[ceil(K / G), N]``.
      lut: ``[T, 2**bits, p]``.
      offsets: Like ``scales``, or None.
      k: The number of rows K.
      group_size: Rows that share a scale.
      implementation: ``"mosaic_tpu"`` and ``"mosaic_gpu"`` have their own layouts.
      dtype: Of the activations.
      device_kind: Of the device, e.g. ``"TPU v6 lite"``; None: the one that is compiled for.
      zero: Of :func:`zero_of_line`, which does not know a table that is traced. A TPU converts the
        codes of such a table instead of looking them up.

    Returns:
      A pytree for :func:`packed_matmul`.

    Raises:
      NotImplementedError: If the implementation does not take this weight.

    >>> from pallas_kernels.layout import pack
    >>> words = pack(jnp.zeros((64, 8), jnp.uint8), bits=4)
    >>> scales, lut = jnp.ones((1, 8)), jnp.ones((1, 16, 1))
    >>> packed = prepack(words, scales, lut, k=64, group_size=64, implementation="xla")
    >>> packed_matmul(jnp.ones((1, 64)), packed)[0, 0].item()
    64.0
    """
    _, bits, n = words.shape
    x = jax.ShapeDtypeStruct((16, k), dtype)
    static: dict[str, Any] = {"k": k, "group_size": group_size, "transpose": False}
    reason = dispatch.reason_against(implementation, (x, words, scales, lut, offsets), static)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} cannot run this: {reason}")
    planes: tuple = (words,)
    padded: tuple = ()
    table = lut
    if implementation == "mosaic_tpu":
        from pallas_kernels.lut_matmul import mosaic_tpu
        from pallas_kernels.lut_matmul.mosaic_tpu_layout import COMPUTED

        kind = device_kind or dispatch.device_kind("tpu")
        static["device_kind"] = kind
        static["computed"] = zero is not None
        problem = mosaic_tpu.make_problem(x, words, lut, **static)
        if zero is not None and problem.config.lookup in COMPUTED:
            entries = mosaic_tpu.integers(problem)
            scales, lut, offsets = _with_entries(entries, scales, lut, offsets, zero)
        planes, scales, table, _ = mosaic_tpu.prepack(words, scales, lut, problem=problem)
        padded = (problem.padded_k, problem.padded_n, problem.config)
    elif implementation == "mosaic_gpu":
        from pallas_kernels.lut_matmul import mosaic_gpu

        gpu_problem = mosaic_gpu.make_problem(
            16, words, k=k, group_size=group_size, p=lut.shape[-1]
        )
        planes, scales, table = mosaic_gpu.prepack(words, scales, lut, gpu_problem, dtype)
        padded = (gpu_problem.padded_k, gpu_problem.padded_n)
    return PackedWeight(
        planes=planes,
        scales=scales,
        table=table,
        lut=lut,
        offsets=offsets,
        implementation=implementation,
        dtype=np.dtype(dtype),
        k=k,
        n=n,
        bits=bits,
        group_size=group_size,
        p=lut.shape[-1],
        padded=padded,
    )


def zero_of_line(lut: jax.Array) -> int | None:
    """The code of zero in a table whose entries are equally spaced; None for other tables.

    None as well if that cannot be known, because the table is traced or on other hosts, and where
    there are several tables that are not the same.

    >>> zero_of_line(jnp.arange(-8.0, 8.0).reshape(1, 16, 1))
    8
    """
    try:
        if not (lut.is_fully_addressable or lut.is_fully_replicated):
            return None
        tables = np.asarray(lut, np.float64).reshape(-1, *lut.shape[-3:])
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None
    if tables.shape[1] != 1 or tables.shape[3] != 1 or (tables != tables[:1]).any():
        return None
    entries = tables[0, 0, :, 0]
    zeros = np.flatnonzero(entries == 0)
    if len(zeros) != 1:
        return None
    zero, last = int(zeros[0]), len(entries) - 1
    line = (np.arange(last + 1) - zero) * (entries[-1] - entries[0]) / last
    # As near as the rounding of entries and ends to float32 lets them be.
    return zero if (np.abs(entries - line) <= 2**-22 * np.abs(line)).all() else None


def _with_entries(
    entries: np.ndarray, scales: jax.Array, lut: jax.Array, offsets: jax.Array | None, zero: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The same weight with other equally spaced entries: scales, table and offsets."""
    step = (lut[0, -1, 0] - lut[0, 0, 0]).astype(jnp.float32) / (entries[-1] - entries[0])
    scales = scales.astype(jnp.float32) * step
    if entries[zero]:  # what stands for zero is not zero
        moved = scales * -entries[zero]
        offsets = moved if offsets is None else offsets.astype(jnp.float32) + moved
    return scales, jnp.asarray(entries).reshape(1, -1, 1), offsets


def packed_matmul(
    x: jax.Array,
    weight: PackedWeight,
    *,
    transpose: bool = False,
    out_dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """``x @ W`` or ``x @ W.T`` for a prepacked weight; inference only (no gradient).

    Args:
      x: ``[..., K]``, or ``[..., N]`` when transposed.
      weight: From :func:`prepack`.
      transpose: Multiplies by the transposed weight, from the same words.
      out_dtype: Of the result, to which the kernel's float32 sums are rounded; None: that of ``x``.
      interpret: Runs the kernel in interpret mode, as inside ``interpret_kernels()``.

    Returns:
      ``[..., N]`` in ``out_dtype``, or ``[..., K]`` when transposed.

    Raises:
      TypeError: If a kernel's layout was made for activations of another dtype.
      ValueError: If ``x`` does not end in K (N when transposed).
      NotImplementedError: If the kernel has no transposed product for this layout or group size.
    """
    contracted, columns = (weight.n, weight.k) if transpose else (weight.k, weight.n)
    _check(x, weight, contracted, transpose)
    if transpose and weight.padded:
        reason = _reason_against_transposed(weight)
        if reason is not None:
            raise NotImplementedError(
                f"{reason}; use lut_matmul(..., transpose=True) with the canonical words"
            )
    out_dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    if not x.size:
        return jnp.zeros((*x.shape[:-1], columns), out_dtype)
    interpret = interpret or dispatch.interpreting()
    rows, weight = _vary_alike(x.reshape(-1, contracted), weight)
    y = _apply(rows, weight, transpose, out_dtype, interpret)
    return y.reshape(*x.shape[:-1], columns)


def packed_matmul_grouped(
    x: jax.Array,
    weight: PackedWeight,
    groups: jax.Array,
    sizes: jax.Array,
    *,
    out_dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """``x[i] @ W[groups[i]]`` for a prepacked stack of weights, which is read where it lies.

    Args:
      x: ``[tiles, M, K]``.
      weight: From :func:`prepack` under :func:`jax.vmap`, in a layout of a kernel's own.
      groups: ``int[tiles]``, which weight each tile meets, in range.
      sizes: ``int[tiles]``, how many rows of each tile count.
      out_dtype: Of the result; None: that of ``x``.
      interpret: Runs the kernel in interpret mode, as inside ``interpret_kernels()``.

    Returns:
      ``[tiles, M, N]`` in ``out_dtype``; zeros where rows do not count.

    Raises:
      TypeError: If the layout was made for activations of another dtype.
      ValueError: If ``x`` does not end in K.
      NotImplementedError: If the layout is no kernel's own.
    """
    if not weight.padded:
        raise NotImplementedError(
            f"implementation {weight.implementation!r} has no product with several weights"
        )
    _check(x, weight, weight.k, transpose=False)
    out_dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    if not x.size:
        return jnp.zeros((*x.shape[:-1], weight.n), out_dtype)
    operands = _vary_alike(x, weight, groups, sizes)
    return _apply_grouped(*operands, out_dtype, interpret or dispatch.interpreting())


@jax.jit
def packed_columns(weight: PackedWeight, columns: jax.Array) -> jax.Array:
    """``W[:, columns]``, of which no other column is looked up: tokens of a tied embedding.

    Args:
      weight: From :func:`prepack`.
      columns: ``int[C]``, in range.

    Returns:
      ``[K, C]`` in the dtype of the weight, rounded once.

    >>> from pallas_kernels.layout import pack
    >>> words = pack(jnp.arange(8).reshape(1, 8), bits=4)
    >>> scales, lut = jnp.ones((1, 8)), jnp.arange(16.0).reshape(1, 16, 1)
    >>> packed = prepack(words, scales, lut, k=1, group_size=1, implementation="xla")
    >>> packed_columns(packed, jnp.array([5, 3])).tolist()
    [[5.0, 3.0]]
    """
    planes, scales = weight.planes, weight.scales
    if not weight.padded:
        words = take_columns(planes[0], columns)
    elif weight.implementation == "mosaic_tpu":
        from pallas_kernels.lut_matmul import mosaic_tpu, mosaic_tpu_layout

        problem = _tpu_problem(jax.ShapeDtypeStruct((16, weight.k), weight.dtype), weight, False)
        planes = tuple(take_columns(plane, columns) for plane in planes)
        codes = mosaic_tpu_layout.unpack_planes(planes, weight.bits, problem.config.lookup)
        words = pack(codes, weight.bits)
        scales = mosaic_tpu.untiled(scales, problem)
    else:
        from pallas_kernels.lut_matmul import mosaic_gpu_layout

        bits_of_row = weight.bits // weight.p
        codes = mosaic_gpu_layout.unpack_columns(planes, bits_of_row, columns, weight.p)
        words = pack(codes, weight.bits)
    one_table = weight.lut.shape[0] == 1
    return dequantize(
        words,
        take_columns(scales[: -(-weight.k // weight.group_size)], columns),
        weight.lut if one_table else jnp.take(weight.lut, columns, axis=0),
        None if weight.offsets is None else take_columns(weight.offsets, columns),
        k=weight.k,
        group_size=weight.group_size,
        dtype=weight.dtype,
    )


def take_columns(array: jax.Array, columns: jax.Array) -> jax.Array:
    """``array[..., columns]``, for columns in range, which moves nothing else on a TPU either."""
    if dispatch.compiling_for("tpu"):
        return _columns_by_tiles(array, columns)
    return jnp.take(array, columns, axis=-1, mode="clip")


def _columns_by_tiles(array: jax.Array, columns: jax.Array) -> jax.Array:
    """One lane of one tile after the other: for a gather, XLA would transpose all of the array."""
    n = array.shape[-1]
    width = min(128, n)

    def one(column: jax.Array) -> jax.Array:
        start = jnp.minimum(column // width * width, n - width)
        tile = jax.lax.dynamic_slice_in_dim(array, start, width, axis=-1)
        lane = jax.lax.broadcasted_iota(columns.dtype, tile.shape, tile.ndim - 1)
        return jnp.sum(jnp.where(lane == column - start, tile, 0), axis=-1, dtype=tile.dtype)

    return jnp.moveaxis(jax.lax.map(one, columns), 0, -1)


def _vary_alike(*operands: Any) -> tuple:
    """The operands varying over the same axes of a mesh, as those of a kernel have to."""
    axes = varying_axes(*jax.tree.leaves(operands))
    return jax.tree.map(lambda a: vary_over(a, axes), operands)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _apply_grouped(
    x: jax.Array,
    weight: PackedWeight,
    groups: jax.Array,
    sizes: jax.Array,
    out_dtype: np.dtype,
    interpret: Any,
) -> jax.Array:
    if weight.implementation == "mosaic_tpu":
        from pallas_kernels.lut_matmul import mosaic_tpu

        problem = _tpu_problem(x[0], weight, transpose=False)
        packed = (weight.planes, weight.scales, weight.table, None)
        y = mosaic_tpu.apply_grouped(
            x, packed, problem, groups, sizes, k=weight.k, n=weight.n, interpret=interpret
        )
    else:
        from pallas_kernels.lut_matmul import mosaic_gpu

        y = mosaic_gpu.apply_grouped(
            x,
            (weight.planes, weight.scales, weight.table),
            _gpu_problem(x.shape[1], weight, transpose=False, tiles=x.shape[0]),
            groups,
            sizes,
            out_dtype=_kernel_dtype(out_dtype, weight),
            interpret=interpret,
        )[..., : weight.n]
    if weight.offsets is not None:
        static = _static(weight, transpose=False)
        add = jax.vmap(lambda y, x, offsets: add_offsets(y, x, offsets, **static))
        y = add(y, x, jnp.take(weight.offsets, groups, axis=0))
    counts = jnp.arange(x.shape[1])[None] < sizes[:, None]
    return jnp.where(counts[..., None], y, 0).astype(out_dtype)


def _reason_against_transposed(weight: PackedWeight) -> str | None:
    if weight.implementation == "mosaic_tpu":
        return None
    from pallas_kernels.lut_matmul import mosaic_gpu

    return mosaic_gpu.reason_against_transposed(weight.scales.shape[0], weight.group_size)


def _check(x: jax.Array, weight: PackedWeight, contracted: int, transpose: bool) -> None:
    if x.shape[-1] != contracted:
        raise ValueError(
            f"x of shape {x.shape} must end in {'N' if transpose else 'K'}={contracted} to be "
            f"multiplied by the {'transposed ' if transpose else ''}weight "
            f"[K={weight.k}, N={weight.n}]"
        )
    if weight.padded and x.dtype != weight.dtype:
        raise TypeError(
            f"the weight is prepacked for activations of {weight.dtype}, got {x.dtype}; use "
            f"prepack(..., dtype={x.dtype.name!r}) or cast x"
        )


def _static(weight: PackedWeight, transpose: bool) -> dict[str, Any]:
    return {"k": weight.k, "group_size": weight.group_size, "transpose": transpose}


def _words_like(weight: PackedWeight) -> jax.ShapeDtypeStruct:
    """The canonical words of one weight, of which the sizes of a product are known."""
    blocks = -(-weight.k // (8 * weight.p))
    return jax.ShapeDtypeStruct((blocks, weight.bits, weight.n), jnp.uint8)


def _tpu_problem(x: jax.Array | jax.ShapeDtypeStruct, weight: PackedWeight, transpose: bool) -> Any:
    from pallas_kernels.lut_matmul import mosaic_tpu

    config = _for_rows(weight.padded[2], x.shape[0], transpose)
    static = _static(weight, transpose)
    lut = jax.ShapeDtypeStruct((1, 2**weight.bits, weight.p), jnp.float32)
    return mosaic_tpu.make_problem(x, _words_like(weight), lut, **static, config=config)


def _gpu_problem(m: int, weight: PackedWeight, transpose: bool, tiles: int = 1) -> Any:
    from pallas_kernels.lut_matmul import mosaic_gpu

    static = _static(weight, transpose)
    return mosaic_gpu.make_problem(
        m, _words_like(weight), **static, p=weight.p, padded=weight.padded[:2], tiles=tiles
    )


def _kernel_dtype(out_dtype: Any, weight: PackedWeight) -> Any:
    """Of the kernel's result, to which offsets are added before it is rounded."""
    return out_dtype if weight.offsets is None else jnp.float32


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _apply(
    x: jax.Array, weight: PackedWeight, transpose: bool, out_dtype: np.dtype, interpret: Any
) -> jax.Array:
    static = _static(weight, transpose)
    if not weight.padded:
        return lut_matmul(
            x.astype(max(x.dtype, out_dtype, key=lambda dtype: dtype.itemsize)),
            weight.planes[0],
            weight.scales,
            weight.table,
            weight.offsets,
            **static,
            implementation=weight.implementation,
        ).astype(out_dtype)
    if weight.implementation == "mosaic_tpu":
        from pallas_kernels.lut_matmul import mosaic_tpu

        problem = _tpu_problem(x, weight, transpose)
        packed = (weight.planes, weight.scales, weight.table, None)
        y = mosaic_tpu.apply(x, packed, problem, k=weight.k, n=weight.n, interpret=interpret)
    else:
        from pallas_kernels.lut_matmul import mosaic_gpu

        y = mosaic_gpu.apply(
            x,
            (weight.planes, weight.scales, weight.table),
            _gpu_problem(x.shape[0], weight, transpose),
            out_dtype=_kernel_dtype(out_dtype, weight),
            interpret=interpret,
        )[:, : weight.k if transpose else weight.n]
    return add_offsets(y, x, weight.offsets, **static).astype(out_dtype)


def _for_rows(config: Any, m: int, transpose: bool) -> Any:
    """The tiles of a TPU configuration for another number of rows; the layout stays."""
    rows = min(64, -(-m // 16) * 16)
    return dataclasses.replace(config, block_m=rows, scale_weights=transpose)
