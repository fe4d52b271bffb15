"""Block formats of GGUF that are lookup-table weights already: Q4_0, Q4_1 and Q8_0, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import LutArray, MatrixView
from lutjax.io.checkpoint import Checkpoint
from lutjax.io.gguf import BLOCK, GRID_BITS, GGUFReader, GridBlocks
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.packing import pack, packed_shape


def has_grid(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a parameter is stored in a block format that is kept exactly."""
    if not isinstance(checkpoint.reader, GGUFReader):
        return False
    info = checkpoint.reader.infos[checkpoint_name(path, checkpoint.fmt)]
    return info.dtype in GRID_BITS and len(info.shape) == 2


def check_keeps_quantized(checkpoint: Checkpoint) -> None:
    """Checks that there is something to keep.

    Raises:
      ValueError: if the checkpoint is not GGUF or none of its matrices is in such a format.
    """
    if not any(has_grid(checkpoint, path) for path in checkpoint.shapes):
        raise ValueError(
            f"keep_quantized: {checkpoint.source} has no matrix of the GGUF types "
            f"{', '.join(GRID_BITS)}"
        )


def grid_array(checkpoint: Checkpoint, path: str) -> LutArray:
    """Reads a parameter as the codes, scales and offsets it is stored as.

    Its `materialize()` is bit for bit what dequantising the block format gives: a code times a
    float16 scale is exact in float32, so only the addition of the offset rounds.

    Args:
      checkpoint: a GGUF file.
      path: of a parameter for which `has_grid` holds.

    Returns:
      A `LutArray` of the parameter's shape with groups of 32 along the contraction axis.

    Raises:
      ValueError: if it is of another type, or a scale or offset is not finite.
    """
    return lut_from_grid(checkpoint.read_grid(path), transposed=is_transposed(path))


def abstract_grid_array(checkpoint: Checkpoint, path: str) -> LutArray:
    """The `LutArray` of `grid_array` with `jax.ShapeDtypeStruct` for arrays; nothing is read."""
    info = checkpoint.reader.infos[checkpoint_name(path, checkpoint.fmt)]
    n, k = info.shape
    bits = GRID_BITS[info.dtype]
    spec: Any = jax.ShapeDtypeStruct
    return LutArray(
        words=spec(packed_shape((k, n), bits), jnp.uint8),
        scales=spec((k // BLOCK, n), jnp.float16),
        lut=spec((1, 2**bits, 1), jnp.float32),
        offsets=spec((k // BLOCK, n), jnp.float16) if info.dtype == "Q4_1" else None,
        group_size=BLOCK,
        padding=0,
        dtype=np.dtype(np.float32),
        view=_view(n, k, is_transposed(path)),
    )


def lut_from_grid(grid: GridBlocks, *, transposed: bool) -> LutArray:
    """Repacks codes on a uniform grid as a `LutArray`.

    Args:
      grid: codes `[out, in]` with groups of 32 along `in`.
      transposed: whether the weight is `[in, out]` (a kernel) or `[out, in]` (an embedding).

    Returns:
      The weight; both contract `in`.
    """
    n, k = grid.codes.shape
    bits = grid.levels.size.bit_length() - 1
    return LutArray(
        words=_pack(grid.codes.T, bits),
        scales=jnp.asarray(grid.scales.T.astype(np.float16)),
        lut=jnp.asarray(grid.levels.reshape(1, -1, 1)),
        offsets=None if grid.offsets is None else jnp.asarray(grid.offsets.T.astype(np.float16)),
        group_size=BLOCK,
        padding=0,
        dtype=np.dtype(np.float32),
        view=_view(n, k, transposed),
    )


def _view(n: int, k: int, transposed: bool) -> MatrixView:
    return MatrixView.of((k, n), (0,)) if transposed else MatrixView.of((n, k), (1,))


_pack = jax.jit(pack, static_argnums=1)
