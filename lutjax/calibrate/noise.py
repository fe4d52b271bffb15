"""How much the loss grows with the relative error of each weight."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lutjax.calibrate.costs import plannable
from lutjax.calibrate.hashing import content_hash
from lutjax.calibrate.number_cache import NumberCache
from lutjax.paths import map_named, named_leaves, path_key
from lutjax.progress import progress_bar
from lutjax.transforms.quantize import check_finite
from lutjax.transforms.recipe import Recipe


def noise_sensitivities(
    loss_fn: Callable[[Any, Any], Float[Array, ""]],
    params: Any,
    batches: Iterable[Any],
    *,
    key: PRNGKeyArray,
    relative_error: float = 0.01,
    recipe: Recipe | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, float]:
    r"""Measures :math:`\alpha_l` of the linearity theorem, by adding noise to one weight at a time.

    .. math:: \ell(\hat W) - \ell(W) \approx \sum_l \alpha_l t_l^2, \quad
              t_l^2 = \frac{\|\hat W_l - W_l\|^2}{\|W_l\|^2}

    Noise is added and subtracted and the two losses are averaged, so that the slope of the loss,
    which has no part in the theorem, cancels: with :math:`t^2` as ``relative_error``,
    :math:`\alpha = ((\ell(W + \epsilon) + \ell(W - \epsilon)) / 2 - \ell(W)) / t^2`. What comes out
    negative, by chance, is 0. This takes two losses for every weight and batch, and each batch has
    its own noise: many small batches average over more of it than few large ones.

    Args:
      loss_fn: Parameters and one batch to a scalar loss.
      params: A pytree of dense parameters.
      batches: Pytrees of arrays that ``loss_fn`` takes; all are used for every weight.
      key: For the noise. Each weight and batch has its own, made from this one.
      relative_error: :math:`t^2`, that of 4 bits by default; large errors see more than the
        curvature.
      recipe: Which parameters; by default all matrices but embeddings, head and norms. Its
        configurations have no meaning here.
      cache: A file of JSON lines: each result is appended as it comes, under a hash of all weights,
        the batches and the settings, but not of ``loss_fn``; a later call goes on from it.
      progress: Show a progress bar.

    Returns:
      :math:`\alpha` by path, in units of the loss.

    Raises:
      ValueError: If there is no data, a loss or a weight is not finite, an argument is out of
        range, or the cache is of other weights.

    Source: HIGGS (arXiv 2411.17525, section 4), which regresses on several errors instead.

    >>> def loss(params, batch):
    ...     return jnp.sum(params["a"] ** 2) + 5 * jnp.sum(params["b"] ** 2)
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    >>> found = noise_sensitivities(loss, params, [None], key=jax.random.key(0))
    >>> {path: round(alpha, 1) for path, alpha in found.items()}  # of |W|^2: 4 and 5 * 4
    {'a': 4.0, 'b': 20.0}
    """
    if not (math.isfinite(relative_error) and relative_error > 0):
        raise ValueError(f"relative_error={relative_error} must be a positive number")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give at least one")
    counts = {matrix.path: matrix.count for matrix in plannable(params, recipe)}
    for path, leaf in named_leaves(params):
        if path in counts:
            check_finite(leaf, path)
    compiled = jax.jit(loss_fn)

    def loss(params: Any, batch: Any) -> float:
        value = float(compiled(params, batch))
        if not math.isfinite(value):
            raise ValueError("the loss is NaN or infinite; leave a batch out or mend the model")
        return value

    def with_noise(path: str, key: PRNGKeyArray, size: float) -> Any:
        def one(name: str, leaf: Any) -> Any:
            if name != path:
                return leaf
            return _perturb(leaf, path_key(key, path), size, counts[path])

        return map_named(one, params)

    store = NumberCache(cache)
    measured: dict[str, Any] = {"weight": ""}
    if cache is not None:
        measured = {
            "weight": content_hash(params),
            "batches": content_hash(batches),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "relative_error": relative_error,
        }
    entries = {path: {"path": path, **measured} for path in counts}
    for entry in entries.values():
        store.check(entry)
    found = {path: known for path in counts if (known := store.get(entries[path])) is not None}
    missing = [path for path in counts if path not in found]
    keys = jax.random.split(key, len(batches))
    before = [loss(params, batch) for batch in batches] if missing else []
    size = math.sqrt(relative_error)
    for path in progress_bar(missing, "sensitivities", "weight", show=progress):
        after = [
            0.5 * sum(loss(with_noise(path, own, sign * size), batch) for sign in (1, -1))
            for batch, own in zip(batches, keys, strict=True)
        ]
        found[path] = max(0.0, float(np.mean(np.subtract(after, before))) / relative_error)
        store.put(entries[path], found[path])
    return {path: found[path] for path in counts}


@functools.partial(jax.jit, static_argnames="count")
def _perturb(weight: jax.Array, key: PRNGKeyArray, size: Any, count: int) -> jax.Array:
    """Adds normal noise of ``size`` times its norm to each of ``count`` stacked matrices."""
    wide = weight.astype(jnp.float32).reshape(count, -1)
    noise = jax.random.normal(key, wide.shape)
    squares = [jnp.sum(jnp.square(a), axis=1, keepdims=True) for a in (wide, noise)]
    noisy = wide + size * jnp.sqrt(squares[0] / squares[1]) * noise
    return noisy.reshape(weight.shape).astype(weight.dtype)
