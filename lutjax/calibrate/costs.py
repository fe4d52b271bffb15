"""What each candidate configuration costs each matrix, measured by decomposing it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from lutjax.allocate import CostTable, Matrix
from lutjax.allocate.grid import fits
from lutjax.calibrate.hashing import content_hash
from lutjax.calibrate.number_cache import NumberCache
from lutjax.paths import named_leaves
from lutjax.progress import progress_bar
from lutjax.transforms.decompose import Method, check_calibrated, decompose_array
from lutjax.transforms.quantize import match_rules, weight_view
from lutjax.transforms.recipe import LutConfig, Recipe, Rule, check_recipe


def plannable(params: Any, recipe: Recipe | None = None) -> tuple[Matrix, ...]:
    """The matrices that a recipe reaches, by path and stored shape.

    Args:
      params: A pytree of parameters, or of ``jax.ShapeDtypeStruct``.
      recipe: Which paths; by default all matrices but embeddings, head and norms.

    Raises:
      ValueError: If a rule matches nothing, or no matrix is reached.

    >>> plannable({"kernel": jax.ShapeDtypeStruct((64, 32), "float32")})
    (Matrix(path='kernel', k=64, n=32, count=1, axis=None, batch_ndim=None),)
    """
    rules = match_rules(_paths_of(recipe), params)
    matrices = []
    for path, leaf in named_leaves(params):
        if path not in rules:
            continue
        rule = rules[path]
        batch_ndim, view = weight_view(leaf.shape, rule, path)
        k, n = view.matrix_shape(leaf.shape[batch_ndim:])
        count = math.prod(leaf.shape[:batch_ndim])
        matrices.append(Matrix(path, k, n, count, rule.axis, rule.batch_ndim))
    if not matrices:
        raise ValueError("the recipe reaches no matrix; see Recipe.rule_for")
    return tuple(matrices)


def _paths_of(recipe: Recipe | None) -> Recipe:
    """The paths that a recipe reaches, with a configuration that fits every matrix.

    None reaches all matrices but embeddings, head and norms.
    """
    if recipe is None:
        return Recipe((Rule("*", _FITS_ALL),))
    check_recipe(recipe)
    rules = [
        r if r.config is None else dataclasses.replace(r, config=_FITS_ALL) for r in recipe.rules
    ]
    return Recipe(tuple(rules), recipe.dense)


def measure_costs(
    params: Any,
    candidates: Sequence[LutConfig],
    *,
    rank: int,
    method: Method = "lq",
    key: PRNGKeyArray,
    fisher: Mapping[str, Any] | None = None,
    rounds: int | None = None,
    recipe: Recipe | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    progress: bool = False,
) -> CostTable:
    """Decomposes every matrix with every candidate and keeps the squared (weighted) errors.

    With a cache file, each result is appended as it comes, under a hash of the weight, its Fisher
    information and all settings. A call that was stopped goes on where it was, and several
    processes may write to the same file.

    Args:
      params: A pytree of dense parameters.
      candidates: Configurations, for example ``prune(candidate_grid())``.
      rank: As in :func:`lutjax.decompose`.
      method: As in :func:`lutjax.decompose`.
      key: As in :func:`lutjax.decompose`.
      fisher: As in :func:`lutjax.decompose`.
      rounds: As in :func:`lutjax.decompose`; a few tell the candidates apart.
      recipe: Which parameters; by default all matrices but embeddings, head and norms. Its
        configurations and ``embeddings`` have no meaning here.
      cache: A file of JSON lines.
      workers: Threads that decompose at the same time.
      progress: Show a progress bar.

    Returns:
      The table for :func:`lutjax.allocate.allocate`.

    Raises:
      ValueError: If a weight is not finite, no candidate fits a matrix, or the cache has costs of
        other weights under the same paths; the message names the parameter path.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.2).

    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    >>> table = measure_costs(params, [LutConfig(2), LutConfig(3)], rank=2, key=jax.random.key(0))
    >>> bool(table.costs[0, 0] > table.costs[0, 1] > 0)
    True
    """
    if not candidates:
        raise ValueError("there are no candidates; give at least one configuration")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    matrices = plannable(params, recipe)
    for matrix in matrices:
        check_calibrated("the Fisher information has", fisher, matrix.path)
    weights = dict(named_leaves(params))
    settings = {
        "rank": rank,
        "method": method,
        "rounds": rounds,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    store = NumberCache(cache)
    costs = np.full((len(matrices), len(candidates)), np.inf)
    tasks = []
    for i, matrix in enumerate(matrices):
        measured = {
            "path": matrix.path,
            "axes": [matrix.axis, matrix.batch_ndim],
            "weight": content_hash(weights[matrix.path]) if cache else "",
            "fisher": content_hash(fisher[matrix.path]) if cache and fisher is not None else "",
        }
        store.check(measured)
        for j, config in enumerate(candidates):
            if not fits(matrix.k, config):
                continue
            entry = measured | settings | {"config": dataclasses.asdict(config)}
            known = store.get(entry)
            if known is None:
                tasks.append((i, j, entry))
            else:
                costs[i, j] = known
    # Refuses a matrix that no candidate fits before anything is measured.
    CostTable(matrices, tuple(candidates), _misfits(matrices, candidates))

    def measure(task: tuple[int, int, dict]) -> tuple[int, int, dict, float]:
        i, j, entry = task
        matrix = matrices[i]
        rule = Rule(matrix.path, candidates[j], matrix.axis, matrix.batch_ndim)
        result = decompose_array(
            weights[matrix.path],
            rule,
            rank=rank,
            method=method,
            key=key,
            fisher=None if fisher is None else fisher[matrix.path],
            rounds=rounds,
            path=matrix.path,
        )
        return i, j, entry, float((result.error**2).sum())

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(measure, task) for task in tasks]
        try:
            for future in progress_bar(
                concurrent.futures.as_completed(futures),
                "costs",
                "decomposition",
                show=progress,
                total=len(futures),
            ):
                i, j, entry, cost = future.result()
                costs[i, j] = cost
                store.put(entry, cost)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return CostTable(matrices, tuple(candidates), costs)


_FITS_ALL = LutConfig(group_size="column")


def _misfits(matrices: Sequence[Matrix], candidates: Sequence[LutConfig]) -> np.ndarray:
    """0 where a candidate fits a matrix, inf where not."""
    return np.array([[0.0 if fits(m.k, c) else math.inf for c in candidates] for m in matrices])
