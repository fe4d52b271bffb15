"""Compressing a checkpoint from disk to disk, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from lutjax.io.convert import convert_checkpoint, plan_checkpoint
from lutjax.io.grid import kept_paths
from lutjax.io.load import open_checkpoint
from lutjax.io.new_directory import check_destination
from lutjax.io.safetensors_writer import MAX_SHARD_BYTES
from lutjax.transforms.quantize import quantize_array
from lutjax.transforms.recipe import Recipe


def compress_checkpoint(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe | None = None,
    *,
    keep_quantized: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Quantises a checkpoint into a directory that `lutjax.load` reads.

    Tensors are read, quantised and written one at a time, so the peak memory is a few times the
    largest tensor, whatever the size of the model. Everything that can be known from names and
    shapes is checked before the first weight is read.

    Args:
      source: a directory with config.json and safetensors, a GGUF file, or a hub id.
      destination: the directory to make; nothing may be there.
      recipe: what to do with which parameter; 4-bit NormalFloat in groups of 64 by default.
      keep_quantized: keep matrices that the source has quantised already exactly as they are (see
        `load`); the recipe is for the others.
      allow_nonfinite: whether a weight may have NaN and Inf; it is an error otherwise.
      max_shard_bytes: the size from which the arrays are spread over several files.
      progress: whether to show a progress bar on standard error.

    Raises:
      FileExistsError: if something is at `destination`.
      FileNotFoundError: if a file of the source is missing.
      ValueError: if the source is not sound, the recipe does not fit it, or a weight is not finite.
      OSError: if the disk is full. In all cases nothing is left at `destination`.
    """
    check_destination(destination)
    checkpoint = open_checkpoint(source, allow_nonfinite=allow_nonfinite)
    kept = kept_paths(checkpoint, keep_quantized)
    plan = plan_checkpoint(checkpoint, recipe or Recipe.uniform(), kept)

    def quantized(path: str, weight: jax.Array) -> tuple[Any, None]:
        return quantize_array(weight, plan[path], path=path, allow_nonfinite=allow_nonfinite), None

    convert_checkpoint(
        checkpoint,
        destination,
        plan,
        quantized,
        kept=kept,
        max_shard_bytes=max_shard_bytes,
        progress="quantize" if progress else None,
    )
