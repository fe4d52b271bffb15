"""From one checkpoint on disk to another, one tensor in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lutjax.io.checkpoint import Checkpoint, nest
from lutjax.io.compressed import write_checkpoint
from lutjax.io.grid import abstract_params, grid_array
from lutjax.io.load import load_tokenizer
from lutjax.io.safetensors_writer import MAX_SHARD_BYTES
from lutjax.transforms.quantize import match_rules
from lutjax.transforms.recipe import Recipe, Rule


def plan_checkpoint(
    checkpoint: Checkpoint, recipe: Recipe, kept: Collection[str] = ()
) -> dict[str, Rule]:
    """Which rule applies to which parameter that is not `kept`, by names and shapes alone.

    Raises:
      ValueError: if a rule matches nothing, or a configuration does not fit a weight.
      TypeError: if a path that is named in full is not a floating-point matrix.
    """
    dense = {path: checkpoint.abstract(path) for path in checkpoint.shapes if path not in kept}
    return match_rules(recipe, nest(dense), kept)


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: str | Path,
    planned: Collection[str],
    one: Callable[[str, jax.Array], tuple[Any, Any]],
    *,
    kept: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: str | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint with some parameters compressed; see `write_checkpoint` for the rest.

    Args:
      checkpoint: the source.
      destination: the directory to make.
      planned: paths of what is compressed.
      one: `one(path, weight)` gives the compressed weight, and a note about it of arrays or None.
        It is traced for all weights before the first is read.
      kept: paths of what stays quantised as it is; see `kept_paths`.
      max_shard_bytes: the size from which the arrays are spread over several files.
      progress: what a progress bar says that happens to the parameters; None for no bar.

    Returns:
      The notes by path.

    Raises:
      ValueError: if a weight is not finite; then, too, nothing is left at the destination.
    """
    stored = abstract_params(checkpoint, kept)
    notes: dict[str, Any] = {}

    def spec(path: str) -> Any:
        if path not in planned:
            return stored[path]
        return jax.eval_shape(functools.partial(one, path), stored[path])[0]

    def convert(path: str) -> Any:
        if path in kept:
            return grid_array(checkpoint, path)
        value = checkpoint.read(path).astype(stored[path].dtype, copy=False)
        if path not in planned:
            return value
        array, notes[path] = one(path, jnp.asarray(value))
        return array

    write_checkpoint(
        destination,
        {path: spec(path) for path in checkpoint.shapes},
        convert,
        config=checkpoint.config,
        tokenizer=load_tokenizer(checkpoint),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    return notes
