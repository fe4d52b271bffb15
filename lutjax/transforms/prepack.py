"""Parameters to parameters in the layouts that the kernels of this device read."""

from __future__ import annotations

import dataclasses
from typing import Any

from lutjax.arrays import (
    CompressedArray,
    DenseArray,
    GatedArray,
    LutArray,
    PackedLutArray,
    RowDenseArray,
    RowLutArray,
    SumArray,
)
from lutjax.paths import map_named
from pallas_kernels import native, platforms
from pallas_kernels.lut_matmul import hopper
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.scales import expanded
from pallas_kernels.sparse_matmul import KERNEL_LANES

_GPU_LANES, _TPU_LANES = KERNEL_LANES["gpu"], KERNEL_LANES["tpu"]
_MAX_BITS_BY_ROWS = 4  # of the kernels that read single rows


def prepack(
    params: Any, *, implementation: str | None = None, device_kind: str | None = None
) -> Any:
    """Reorders lookup-table weights once, for inference.

    TPUs and Hopper GPUs read another order than the canonical words, and reorder them in every call
    unless this is done at load time. Only CPUs read quantised scales (:class:`lutjax.DoubleQuant`,
    the K types of GGUF): for other devices they are expanded to float32 here instead of in every
    call. The result is for :func:`lutjax.lift` and cannot be saved, resharded or trained: keep the
    canonical parameters for that. Embeddings are looked up in either order. Call it outside ``jit``
    and ``eval_shape``: equally spaced tables are computed on TPUs instead of looked up, in an order
    of their own, and whether one is that must be known.

    Weights behind a gate (:func:`lutjax.sparsity.sparsify`) are laid out row by row, so that
    decoding reads live rows only: the canonical words keep eight rows together, and so do the tiles
    of a TPU. A CPU reads single rows of the canonical words.

    Weights that are split over a mesh (:func:`lutjax.shardings_like`) are reordered shard by shard
    where they are, and stay split; they are multiplied inside ``jax.shard_map``, whose
    ``in_specs`` ``shardings_like`` gives for them, too.

    Args:
      params: Parameters; weights that stand inside other compressed arrays are found too.
      implementation: Whose layout; None: that of the device that programs are compiled for, and
        the same words where the kernels read canonical ones (CPUs, other GPUs) or the environment
        variable ``PALLAS_KERNELS_DISABLE`` names the kernel. None leaves the words of weights that
        the kernel does not take as they are.
      device_kind: Of a TPU that is not there, e.g. ``"TPU v6 lite"``; None: the device that is
        compiled for.

    Returns:
      A pytree like ``params`` with :class:`lutjax.arrays.PackedLutArray` for ``LutArray``, and
      inside gates :class:`lutjax.arrays.RowLutArray` or (TPU) :class:`lutjax.arrays.RowDenseArray`.

    Raises:
      ValueError: If the named implementation does not take a weight, or its shards are not whole
        groups (the message has its path), or ``device_kind`` is not a TPU's.

    >>> import jax.numpy as jnp
    >>> import lutjax
    >>> params = {"kernel": lutjax.quantize(jnp.eye(64), bits=4, group_size=32)}
    >>> lutjax.prepack(params, implementation="xla")
    {'kernel': PackedLutArray(shape=(64, 64), float32, 4 bits, xla, 2.4 kB)}
    """
    if device_kind is not None and not device_kind.startswith("TPU"):
        raise ValueError(
            f"device_kind={device_kind!r}: only TPUs can be named; for a GPU that is not there "
            "trace under jax.sharding.use_abstract_mesh with its AbstractDevice"
        )
    chosen = implementation or ("mosaic_tpu" if device_kind else _of_this_device())
    lanes = _lanes(chosen)

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, GatedArray):
            base = leaf.base
            base = _with_readable_scales(base) if lanes is None else _by_rows(base, lanes)
            return dataclasses.replace(leaf, base=base)
        if not isinstance(leaf, LutArray):
            return leaf
        if chosen is None:
            return _with_readable_scales(leaf)
        try:
            return PackedLutArray.of(leaf, chosen, device_kind)
        except ValueError as error:
            raise ValueError(f"{path!r} {leaf!r}: {error}") from error
        except NotImplementedError as error:
            if implementation is None:
                return _with_readable_scales(leaf)
            raise ValueError(f"{path!r}: {error}") from error

    stop = (LutArray, GatedArray)
    return map_named(one, params, is_leaf=lambda a: isinstance(a, stop))


def _of_this_device() -> str | None:
    disabled = platforms.disabled()
    if platforms.compiling_for("tpu"):
        return None if "mosaic_tpu" in disabled else "mosaic_tpu"
    kind = platforms.device_kind("cuda")
    if kind is None or "mosaic_gpu" in disabled:
        return None
    if not hopper.is_hopper(kind) or isinstance(LUT_MATMUL.backend("mosaic_gpu"), str):
        return None
    return "mosaic_gpu"


def _lanes(implementation: str | None) -> int | None:
    """Columns that lie together in a row; None where gated weights stay as they are."""
    if implementation == "mosaic_tpu":
        return _TPU_LANES
    on_a_gpu = implementation is None and platforms.compiling_for("cuda")
    return _GPU_LANES if implementation == "mosaic_gpu" or on_a_gpu else None


def _has_kernel_by_rows(weight: LutArray) -> bool:
    one_table = weight.vector_size == 1 and weight.lut.shape[-3] == 1
    return one_table and weight.bits <= _MAX_BITS_BY_ROWS


def _with_readable_scales(weight: CompressedArray) -> CompressedArray:
    """The weight with scales as kernels read them, which each call would expand otherwise."""
    reads = platforms.compiling_for("cpu") and "cpu_native" not in platforms.disabled()
    return weight if reads and native.availability() is None else expanded(weight)


def _by_rows(weight: CompressedArray, lanes: int) -> CompressedArray:
    """The weight row by row; itself if the kernels would not read it so."""
    match weight:
        case LutArray() if _has_kernel_by_rows(weight):
            return RowLutArray.of(weight, lanes)
        case DenseArray() if lanes == _TPU_LANES and weight.matrix_shape[1] % lanes == 0:
            return RowDenseArray.of(weight, lanes)
        case SumArray():
            return SumArray(tuple(_by_rows(part, lanes) for part in weight.parts))
        case _:
            return weight
