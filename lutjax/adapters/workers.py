"""Data-parallel training in which every worker has a map of its own, merged from time to time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lutjax.adapters.dual import AdapterState, AdapterTraining
from lutjax.optim.project import zero_latents
from lutjax.paths import map_named


def start_worker(training: AdapterTraining, state: AdapterState, axis_name: Any) -> AdapterState:
    """Gives this worker its own maps: different random draws of one key.

    Call it inside ``shard_map``, on a state that is the same on all workers. Workers then take
    local steps with :meth:`AdapterTraining.update`, without any communication, and meet in
    :func:`merge_workers`. Semi-orthogonal maps of different workers span orthogonal spaces as long
    as `workers * rank` does not exceed the weight's side.

    Args:
      training: From :func:`lutjax.adapters.dual`.
      state: A run in its adapter form.
      axis_name: The mesh axis of the workers.

    Raises:
      ValueError: For maps that are not random, which another worker could not regenerate, and for
        those that have no other draw (:class:`~lutjax.linear_maps.Identity`,
        :class:`~lutjax.linear_maps.KronA`).

    Source: Duality (arXiv 2502.13811, section 5).
    """
    _check_random(training, state)
    index = jax.lax.axis_index(axis_name)
    return state._replace(maps={p: m.for_worker(index) for p, m in state.maps.items()})


def merge_workers(training: AdapterTraining, state: AdapterState, axis_name: Any) -> AdapterState:
    """Merges all adapters, `theta <- theta + mean_w S_w^T lambda_w`, and draws new maps.

    Only latents cross the network, `r n` numbers a worker and weight: each worker regenerates the
    maps of the others from the common key. Parameters without an adapter are averaged. The inner
    state stays with its worker, carried over to the new map as the training is configured to.

    Call it inside ``shard_map(..., check_vma=False)``; after it the base is the same everywhere.

    Args:
      training: From :func:`lutjax.adapters.dual`.
      state: This worker's run.
      axis_name: The mesh axis of the workers.
    """
    _check_random(training, state)
    config = training.config
    index, count = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def merged(path: str, latent: jax.Array, base: jax.Array) -> jax.Array:
        if path not in state.maps:
            return jax.lax.pmean(latent, axis_name)
        bound = state.maps[path]
        gathered = jax.lax.all_gather(latent, axis_name)

        def add(total: jax.Array, worker: Any) -> tuple[jax.Array, None]:
            number, theirs = worker
            return total + bound.for_worker(number).up(theirs), None

        zero = jnp.zeros_like(base)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(count), gathered))
        return base + total / jnp.asarray(count, base.dtype)

    averaged = map_named(merged, state.latents, state.base, is_leaf=None)
    key = jax.random.wrap_key_data(state.key_data, impl=config.key_impl)
    maps = config.refresh_maps(key, state.count, state.maps, None, averaged)
    maps = {path: bound.for_worker(index) for path, bound in maps.items()}
    latents = zero_latents(maps, averaged)
    inner = config.carry_inner(state.inner, latents, state.maps, maps)
    return state._replace(base=averaged, latents=latents, maps=maps, inner=inner)


def _check_random(training: AdapterTraining, state: AdapterState) -> None:
    map_ = training.config.map
    fix = "use Gaussian, Rademacher or SemiOrthogonal"
    if map_.depends_on != "key":
        raise ValueError(
            f"{map_} depends on the {map_.depends_on}, so workers can't regenerate each other's "
            f"maps; {fix}"
        )
    for path, bound in state.maps.items():
        pairs = zip(jax.tree.leaves(bound), jax.tree.leaves(bound.for_worker(0)), strict=True)
        if all(theirs is ours for ours, theirs in pairs):
            raise ValueError(f"{map_} has one draw for {path!r}, the same for all workers; {fix}")
