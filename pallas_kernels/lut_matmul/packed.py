"""Weights in a kernel's own layout, made once at load time.

The canonical words are what is saved and sharded; a kernel reorders them in every call unless they
were prepacked, which costs about one pass over the packed weight.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.lut_matmul.api import lut_matmul
from pallas_kernels.lut_matmul.columns import take_columns
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.lut_matmul.packed_weight import LAYOUTS, PACKED_ROWS, PackedWeight, layout_of
from pallas_kernels.lut_matmul.reference import dequantize
from pallas_kernels.manual_axes import vary_over, varying_axes
from pallas_kernels.scales import QuantizedScales, expanded


def prepack(
    words: jax.Array,
    scales: jax.Array | QuantizedScales,
    lut: jax.Array,
    offsets: jax.Array | QuantizedScales | None = None,
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
      scales: ``[ceil(K / G), N]``; expanded here if they are quantised themselves.
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
    plain_scales, plain_offsets = expanded((scales, offsets))
    _, bits, n = words.shape
    x = jax.ShapeDtypeStruct((PACKED_ROWS, k), dtype)
    static: dict[str, Any] = {"k": k, "group_size": group_size, "transpose": False}
    reason = LUT_MATMUL.reason_against(implementation, (x, words, scales, lut, offsets), static)
    if reason is not None:
        raise NotImplementedError(f"implementation {implementation!r} cannot run this: {reason}")
    weight = PackedWeight(
        planes=(words,),
        scales=plain_scales,
        table=lut,
        lut=lut,
        offsets=plain_offsets,
        implementation=implementation,
        dtype=np.dtype(dtype),
        k=k,
        n=n,
        bits=bits,
        group_size=group_size,
        p=lut.shape[-1],
    )
    if implementation not in LAYOUTS:
        return weight
    return layout_of(implementation).reorder(weight, device_kind=device_kind, zero=zero)


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
    if transpose and weight.layout is not None:
        reason = layout_of(weight.implementation).reason_against_transposed(weight)
        if reason is not None:
            raise NotImplementedError(
                f"{reason}; use lut_matmul(..., transpose=True) with the canonical words"
            )
    out_dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    if not x.size:
        return jnp.zeros((*x.shape[:-1], columns), out_dtype)
    interpret = interpret or platforms.interpreting()
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
    if weight.layout is None:
        raise NotImplementedError(
            f"implementation {weight.implementation!r} has no product with several weights"
        )
    _check(x, weight, weight.k, transpose=False)
    out_dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    if not x.size:
        return jnp.zeros((*x.shape[:-1], weight.n), out_dtype)
    operands = _vary_alike(x, weight, groups, sizes)
    return _apply_grouped(*operands, out_dtype, interpret or platforms.interpreting())


@functools.partial(jax.jit, static_argnames="dtype")
def packed_columns(weight: PackedWeight, columns: jax.Array, *, dtype: Any = None) -> jax.Array:
    """``W[:, columns]``, of which no other column is looked up: tokens of a tied embedding.

    Args:
      weight: From :func:`prepack`.
      columns: ``int[C]``, which are clipped to those that there are.
      dtype: Of the result; None: that of the weight.

    Returns:
      ``[K, C]``, rounded once.

    >>> from pallas_kernels.layout import pack
    >>> words = pack(jnp.arange(8).reshape(1, 8), bits=4)
    >>> scales, lut = jnp.ones((1, 8)), jnp.arange(16.0).reshape(1, 16, 1)
    >>> packed = prepack(words, scales, lut, k=1, group_size=1, implementation="xla")
    >>> packed_columns(packed, jnp.array([5, 3])).tolist()
    [[5.0, 3.0]]
    """
    columns = jnp.clip(columns.astype(jnp.int32), 0, weight.n - 1)  # layouts have more than N
    if weight.layout is None:
        words = take_columns(weight.planes[0], columns)
        scales = take_columns(weight.scales, columns)
    else:
        words, scales = layout_of(weight.implementation).canonical_columns(weight, columns)
    one_table = weight.lut.shape[0] == 1
    return dequantize(
        words,
        scales[: weight.groups],
        weight.lut if one_table else jnp.take(weight.lut, columns, axis=0, mode="clip"),
        None if weight.offsets is None else take_columns(weight.offsets, columns),
        k=weight.k,
        group_size=weight.group_size,
        dtype=weight.dtype if dtype is None else dtype,
    )


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
    y = layout_of(weight.implementation).product_grouped(
        x, weight, groups, sizes, out_dtype=_kernel_dtype(out_dtype, weight), interpret=interpret
    )
    if weight.offsets is not None:
        static = _static(weight, transpose=False)
        add = jax.vmap(lambda y, x, offsets: add_offsets(y, x, offsets, **static))
        y = add(y, x, jnp.take(weight.offsets, groups, axis=0))
    counts = jnp.arange(x.shape[1])[None] < sizes[:, None]
    return jnp.where(counts[..., None], y, 0).astype(out_dtype)


def _check(x: jax.Array, weight: PackedWeight, contracted: int, transpose: bool) -> None:
    if x.shape[-1] != contracted:
        raise ValueError(
            f"x of shape {x.shape} must end in {'N' if transpose else 'K'}={contracted} to be "
            f"multiplied by the {'transposed ' if transpose else ''}weight "
            f"[K={weight.k}, N={weight.n}]"
        )
    if weight.layout is not None and x.dtype != weight.dtype:
        raise TypeError(
            f"the weight is prepacked for activations of {weight.dtype}, got {x.dtype}; use "
            f"prepack(..., dtype={x.dtype.name!r}) or cast x"
        )


def _static(weight: PackedWeight, transpose: bool) -> dict[str, Any]:
    return {"k": weight.k, "group_size": weight.group_size, "transpose": transpose}


def _kernel_dtype(out_dtype: Any, weight: PackedWeight) -> Any:
    """Of the kernel's result, to which offsets are added before it is rounded."""
    return out_dtype if weight.offsets is None else jnp.float32


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _apply(
    x: jax.Array, weight: PackedWeight, transpose: bool, out_dtype: np.dtype, interpret: Any
) -> jax.Array:
    static = _static(weight, transpose)
    if weight.layout is None:
        return lut_matmul(
            x.astype(max(x.dtype, out_dtype, key=lambda dtype: dtype.itemsize)),
            weight.planes[0],
            weight.scales,
            weight.table,
            weight.offsets,
            **static,
            implementation=weight.implementation,
        ).astype(out_dtype)
    y = layout_of(weight.implementation).product(
        x,
        weight,
        transpose=transpose,
        out_dtype=_kernel_dtype(out_dtype, weight),
        interpret=interpret,
    )
    return add_offsets(y, x, weight.offsets, **static).astype(out_dtype)
