"""Parameters to parameters in the layouts that the kernels of this device read."""

from __future__ import annotations

from typing import Any

import jax

from lutjax.arrays import GatedArray, LutArray, PackedLutArray
from lutjax.paths import path_string
from pallas_kernels.lut_matmul import dispatch


def prepack(
    params: Any, *, implementation: str | None = None, device_kind: str | None = None
) -> Any:
    """Reorders lookup-table weights once, for inference.

    TPUs and Hopper GPUs read another order than the canonical words, and reorder them in every call
    unless this is done at load time. The result is for :func:`lutjax.lift` and cannot be saved,
    resharded or trained: keep the canonical parameters for that. Embeddings stay as they are:
    lookups need single rows, which only the canonical words give.

    Weights that are split over a mesh (:func:`lutjax.shardings_like`) are reordered shard by shard
    where they are, and stay split; they are multiplied inside ``jax.shard_map``, whose
    ``in_specs`` ``shardings_like`` gives for them, too.

    Args:
      params: Parameters; weights that stand inside other compressed arrays are found too.
      implementation: Whose layout; None: that of the device that programs are compiled for, and
        unchanged parameters where the kernels read canonical words (CPUs, other GPUs). None leaves
        weights that the kernel does not take as they are.
      device_kind: Of a TPU that is not there, e.g. ``"TPU v6 lite"``; None: the device that is
        compiled for.

    Returns:
      A pytree like ``params`` with :class:`lutjax.arrays.PackedLutArray` for ``LutArray``; gated
      weights stay (see :func:`lutjax.sparsity.prepack`).

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

    def one(path: tuple, leaf: Any) -> Any:
        if chosen is None or not isinstance(leaf, LutArray) or "embed" in path_string(path):
            return leaf
        try:
            return PackedLutArray.of(leaf, chosen, device_kind)
        except ValueError as error:
            raise ValueError(f"{path_string(path)!r} {leaf!r}: {error}") from error
        except NotImplementedError as error:
            if implementation is None:
                return leaf
            raise ValueError(f"{path_string(path)!r}: {error}") from error

    stop = (LutArray, GatedArray)
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda a: isinstance(a, stop))


def _of_this_device() -> str | None:
    if dispatch.compiling_for("tpu"):
        return "mosaic_tpu"
    kind = dispatch.device_kind("cuda")
    if kind is None or isinstance(dispatch.backend("mosaic_gpu"), str):
        return None
    from pallas_kernels.lut_matmul import mosaic_gpu

    return "mosaic_gpu" if mosaic_gpu.is_hopper(kind) else None
