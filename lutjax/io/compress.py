"""Compressing a checkpoint from disk to disk, one tensor in memory at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.io.checkpoint import Checkpoint, nest
from lutjax.io.compressed import write_checkpoint
from lutjax.io.grid import abstract_grid_array, check_keeps_quantized, grid_array, has_grid
from lutjax.io.load import load_tokenizer, open_checkpoint
from lutjax.io.new_directory import check_destination
from lutjax.io.safetensors_writer import MAX_SHARD_BYTES
from lutjax.transforms.quantize import match_rules, quantize_array
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
    if keep_quantized:
        check_keeps_quantized(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    kept = {path for path in checkpoint.shapes if keep_quantized and has_grid(checkpoint, path)}
    dense = {
        path: jax.ShapeDtypeStruct(shape, stored_dtype(checkpoint, path))
        for path, shape in checkpoint.shapes.items()
        if path not in kept
    }
    plan = match_rules(recipe or Recipe.uniform(), nest(dense), kept)

    def convert(path: str) -> Any:
        if path in kept:
            return grid_array(checkpoint, path)
        value = checkpoint.read(path).astype(dense[path].dtype, copy=False)
        if path not in plan:
            return value
        return quantize_array(
            jnp.asarray(value), plan[path], path=path, allow_nonfinite=allow_nonfinite
        )

    def spec(path: str) -> Any:
        if path in kept:
            return abstract_grid_array(checkpoint, path)
        if path not in plan:
            return dense[path]
        return jax.eval_shape(
            functools.partial(quantize_array, rule=plan[path], path=path), dense[path]
        )

    write_checkpoint(
        destination,
        {path: spec(path) for path in checkpoint.shapes},
        convert,
        config=checkpoint.config,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        progress="quantize" if progress else None,
    )


def stored_dtype(checkpoint: Checkpoint, path: str) -> np.dtype:
    """The dtype a parameter is kept in: the stored one, float32 for float64 and quantised ones."""
    dtype = checkpoint.reader.dtype(checkpoint.name(path))
    return np.dtype(np.float32) if dtype == np.float64 else dtype
