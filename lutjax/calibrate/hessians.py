"""Second moments of the inputs of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.arrays import CompressedArray
from lutjax.calibrate.activations import projections
from lutjax.calibrate.observe import observer
from lutjax.paths import named_leaves
from lutjax.progress import progress_bar
from lutjax.transforms.recipe import Recipe, without_embeddings


def hessians(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> dict[str, Float[Array, "*batch k k"]]:
    """``X.T @ X`` of all that enters each weight: half the Hessian of a product's squared error.

    They take K x K floats a weight, all at the same time;
    :func:`lutjax.calibrate.quantize_decoder` needs only those of a block at a time.

    Args:
      fn: ``fn(params, batch)``; it is lifted, see :func:`lutjax.calibrate.observe`.
      params: Dense or compressed parameters.
      batches: What ``fn`` takes as its second argument; of one shape, or it compiles again.
      recipe: Which parameters; by default all matrices but embeddings, head and norms. Its
        ``embeddings`` have no meaning here.
      progress: Show a progress bar.

    Returns:
      ``float32[*batch, K, K]`` for each path, for :func:`lutjax.quantize`.

    Raises:
      ValueError: If there is no data, a rule matches nothing, the recipe reaches no matrix, or
        nothing enters a weight.

    Source: GPTQ (arXiv 2210.17323, section 3).

    >>> found = hessians(lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(2)}, [jnp.eye(2)])
    >>> found["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    # What is looked up is not multiplied.
    wraps = projections(params, without_embeddings(recipe))
    leaves = {path: leaf for path, leaf in named_leaves(params) if path in wraps}
    sizes = {
        path: jax.eval_shape(wrap, leaves[path]).matrix_shape[0] for path, wrap in wraps.items()
    }
    totals: dict[str, jax.Array] = {}
    statistics = ((path, (wrap, sizes[path] ** 2, _squares)) for path, wrap in wraps.items())
    run = observer(fn, tuple(statistics))
    for batch in progress_bar(batches, "hessians", "batch", show=progress):
        found = run(params, batch)
        totals = _add(totals, found) if totals else found
    if not totals:
        raise ValueError("batches is empty; give at least one")
    for path, total in totals.items():
        if not total.any():
            raise ValueError(
                f"nothing but zeros enters {path!r} where it can be seen: in products x @ w of at "
                f"most 32 bits that lead to an output; name the weights to look at with recipe="
            )
    return {
        path: total.reshape(*total.shape[:-1], sizes[path], sizes[path])
        for path, total in totals.items()
    }


_add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)


def _squares(weight: CompressedArray, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST).reshape(-1)
