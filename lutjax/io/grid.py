"""Quantised matrices of a checkpoint as lookup-table weights, bit for bit."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import LutArray, MatrixView, QuantizedScales, ReorderedArray
from lutjax.io.blocks import CodedScales, GridBlocks, ScaleForm
from lutjax.io.checkpoint import Checkpoint
from lutjax.io.gguf_blocks import BLOCK_TYPES
from lutjax.io.gpt_oss import QUANT_METHOD
from lutjax.io.names import is_transposed
from lutjax.io.quantized import METHODS
from lutjax.packing import BLOCK, pack, packed_shape


def has_grid(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a parameter is stored as codes with scales, which are kept exactly."""
    return checkpoint.grid_spec(path) is not None


def kept_paths(checkpoint: Checkpoint, keep_quantized: bool) -> frozenset[str]:
    """The parameters that stay quantised: those that are, if `keep_quantized` says so.

    Raises:
      ValueError: if there is nothing to keep.
    """
    if not keep_quantized:
        return frozenset()
    kept = frozenset(path for path in checkpoint.shapes if has_grid(checkpoint, path))
    if not kept:
        raise ValueError(
            f"keep_quantized: {checkpoint.source} has no matrix of the GGUF types "
            f"{', '.join(BLOCK_TYPES)}, or quantised by {', '.join((*METHODS, QUANT_METHOD))}"
        )
    return kept


def abstract_params(checkpoint: Checkpoint, kept: Collection[str]) -> dict[str, Any]:
    """All parameters by path with `jax.ShapeDtypeStruct` for arrays; those `kept` are quantised."""
    return {
        path: abstract_grid_array(checkpoint, path) if path in kept else checkpoint.abstract(path)
        for path in checkpoint.shapes
    }


def grid_array(checkpoint: Checkpoint, path: str) -> LutArray | ReorderedArray:
    """Reads a parameter as the codes, scales and offsets it is stored as.

    Its `materialize()` is bit for bit what dequantising it gives: where there are offsets, a code
    times a scale is exact in float32, so only the addition rounds.

    Args:
      checkpoint: an opened checkpoint.
      path: of a parameter for which `has_grid` holds.

    Returns:
      A `LutArray` of the parameter's shape with groups along the contraction axis; if the columns
      were sorted before they were grouped (GPTQ with `desc_act`), in a `ReorderedArray`.

    Raises:
      ValueError: if it is stored in another way, a scale or offset is not finite, or columns are
        sorted though the configuration says that they are not.
    """
    grid, spec = checkpoint.read_grid(path), checkpoint.grid_spec(path)
    array = lut_from_grid(grid, transposed=is_transposed(path))
    if spec is not None and spec.reordered:
        *experts, _, k = grid.codes.shape
        order = np.arange(k) if grid.columns is None else grid.columns
        order = np.broadcast_to(order, (*experts, k))
        return ReorderedArray.of(array, jnp.asarray(order, jnp.int32))
    if grid.columns is not None:
        raise ValueError(
            f"{checkpoint.source}: the columns of {path} are sorted into groups, but "
            "quantization_config does not say so; set its desc_act to true"
        )
    return array


def abstract_grid_array(checkpoint: Checkpoint, path: str) -> LutArray | ReorderedArray:
    """The array of `grid_array` with `jax.ShapeDtypeStruct` for arrays; nothing is read.

    Raises:
      ValueError: if the parameter is stored in another way.
    """
    grid = checkpoint.grid_spec(path)
    if grid is None:
        raise ValueError(f"{checkpoint.source}: {path} is not stored as codes with scales")
    *experts, n, k = grid.shape
    spec: Any = jax.ShapeDtypeStruct
    groups = -(-k // grid.group_size)

    def scales(form: np.dtype | ScaleForm | None) -> Any:
        if not isinstance(form, ScaleForm):
            return None if form is None else spec((*experts, groups, n), form)
        words = spec((*experts, *packed_shape((groups, n), form.bits)), jnp.uint8)
        steps = spec((*experts, -(-groups // form.block), n), form.dtype)
        return _quantized_scales(words, steps, groups, form)

    array = LutArray(
        words=spec((*experts, *packed_shape((k, n), grid.bits)), jnp.uint8),
        scales=scales(grid.scales),
        lut=spec((*experts, 1, 2**grid.bits, 1), jnp.float32),
        offsets=scales(grid.offsets),
        group_size=grid.group_size,
        padding=-k % BLOCK,
        dtype=np.dtype(np.float32),
        view=_view(n, k, is_transposed(path)),
    )
    return ReorderedArray(array, spec((*experts, k), jnp.int32)) if grid.reordered else array


def lut_from_grid(grid: GridBlocks, *, transposed: bool) -> LutArray:
    """Repacks codes as a `LutArray`.

    Args:
      grid: codes `[*experts, out, in]`; the order of their columns stays as it is.
      transposed: whether the weight is `[in, out]` (a kernel) or `[out, in]` (an embedding).

    Returns:
      The weight; both contract `in`.
    """
    *experts, n, k = grid.codes.shape
    size = grid.levels.shape[-1]
    bits = size.bit_length() - 1
    lut = np.broadcast_to(grid.levels[..., None, :, None], (*experts, 1, size, 1))
    return LutArray(
        words=_pack(grid.codes.swapaxes(-1, -2), bits),
        scales=_scales(grid.scales),
        lut=jnp.asarray(lut),
        offsets=_scales(grid.offsets),
        group_size=grid.group_size,
        padding=-k % BLOCK,
        dtype=np.dtype(np.float32),
        view=_view(n, k, transposed),
    )


def _scales(scales: np.ndarray | CodedScales | None) -> Any:
    if not isinstance(scales, CodedScales):
        return None if scales is None else jnp.asarray(scales.swapaxes(-1, -2))
    words = _pack(scales.codes.swapaxes(-1, -2), scales.form.bits)
    steps = jnp.asarray(scales.steps.swapaxes(-1, -2))
    return _quantized_scales(words, steps, scales.codes.shape[-1], scales.form)


def _quantized_scales(words: Any, steps: Any, groups: int, form: ScaleForm) -> QuantizedScales:
    return QuantizedScales(words, steps, None, -groups % BLOCK, (form.block, 1), form.zero)


def _view(n: int, k: int, transposed: bool) -> MatrixView:
    return MatrixView.of((k, n), (0,)) if transposed else MatrixView.of((n, k), (1,))


_pack = jax.jit(pack, static_argnums=1)
