"""Decomposing a checkpoint from disk to disk, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from lutjax.io.convert import convert_checkpoint, plan_checkpoint
from lutjax.io.load import open_checkpoint
from lutjax.io.new_directory import check_destination
from lutjax.transforms.decompose import Method, check_decomposition, decompose_array
from lutjax.transforms.recipe import Recipe
from lutjax.transforms.svd import SvdMethod


def decompose_checkpoint(
    source: str | Path,
    destination: str | Path,
    recipe: Recipe,
    *,
    rank: int,
    method: Method = "lq",
    key: PRNGKeyArray,
    fisher: Mapping[str, Any] | None = None,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    progress: bool = False,
) -> dict[str, float]:
    """Decomposes a checkpoint into a directory that `lutjax.load` reads.

    Like `lutjax.decompose`, but tensors are read, decomposed and written one at a time. Everything
    that can be known from names and shapes is checked before the first weight is read.

    Args:
      source: a directory with config.json and safetensors, a GGUF file, or a hub id.
      destination: the directory to make; nothing may be there.
      recipe: how to quantise which parameter; an allocation plan is one.
      rank: as in `lutjax.decompose`.
      method: as in `lutjax.decompose`.
      key: as in `lutjax.decompose`.
      fisher: as in `lutjax.decompose`.
      rounds: as in `lutjax.decompose`.
      svd: as in `lutjax.decompose`.
      progress: whether to show a progress bar on standard error.

    Returns:
      The (weighted) Frobenius error of each decomposed parameter.

    Raises:
      FileExistsError: if something is at `destination`.
      FileNotFoundError: if a file of the source is missing.
      ValueError: if the source is not sound, the recipe or rank does not fit it, or a weight is
        not finite. In all cases nothing is left at `destination`.
    """
    check_destination(destination)
    checkpoint = open_checkpoint(source)
    plan = plan_checkpoint(checkpoint, recipe)
    check_decomposition(
        {path: (checkpoint.shapes[path], rule) for path, rule in plan.items()},
        rank=rank,
        method=method,
        rounds=rounds,
        svd=svd,
        fisher=fisher,
    )

    def decomposed(path: str, weight: jax.Array) -> tuple[Any, jax.Array]:
        result = decompose_array(
            weight,
            plan[path],
            rank=rank,
            method=method,
            key=key,
            fisher=None if fisher is None else fisher[path],
            rounds=rounds,
            svd=svd,
            path=path,
            allow_nonfinite=True,  # reading a weight looks for NaN already
        )
        return result.array, jnp.linalg.norm(result.error)

    errors = convert_checkpoint(
        checkpoint, destination, plan, decomposed, progress="decompose" if progress else None
    )
    return {path: float(error) for path, error in errors.items()}
