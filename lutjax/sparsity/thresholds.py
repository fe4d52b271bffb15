"""Sparsity plans from calibration: uniform, from a greedy search, or from given thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lutjax.calibrate.activations import ActivationQuantiles, activation_quantiles, projections
from lutjax.calibrate.histogram import MagnitudeHistogram
from lutjax.paths import named_leaves, near_misses
from lutjax.sparsity.apply import sparsify
from lutjax.sparsity.greedy import GreedySearch
from lutjax.sparsity.plan import Gate, SparsityPlan, as_tuple


def plan_uniform(params: Any, quantiles: ActivationQuantiles, target: float) -> SparsityPlan:
    """The same sparsity for every weight: t is the ``target``-quantile of what it is compared with.

    With quantiles of the score ``"wina"`` this is WINA gating.

    Args:
      params: The parameters that were calibrated, for their shapes.
      quantiles: See :func:`lutjax.calibrate.activation_quantiles`.
      target: The share of activations to ignore, in [0, 1).

    Raises:
      ValueError: If the target is outside, or the quantiles belong to other weights.

    Source: TEAL (arXiv 2408.14690, section 4); WINA (arXiv 2505.19427).
    """
    check_target(target)
    method = "uniform" if quantiles.score == "magnitude" else "wina"
    return _plan(method, target, params, dict.fromkeys(quantiles, target), quantiles)


def plan_greedy(
    params: Any, quantiles: ActivationQuantiles, search: GreedySearch, target: float
) -> SparsityPlan:
    """The sparsities that a greedy search reached at ``target`` in every block.

    Raises:
      ValueError: If the search did not go that far, or does not fit the quantiles.

    Source: TEAL (arXiv 2408.14690, algorithm 1).
    """
    check_target(target)
    return _plan("greedy", target, params, search.sparsities(target), quantiles)


def plan_thresholds(
    params: Any,
    thresholds: Mapping[str, Any],
    quantiles: ActivationQuantiles | None = None,
) -> SparsityPlan:
    """Given thresholds.

    Args:
      params: Parameters, for their shapes.
      thresholds: By path; weights that are not named get no gate.
      quantiles: Tells the sparsities to expect, and the score.

    Raises:
      ValueError: If a path does not exist, is no projection or is not among the quantiles, or a
        threshold is negative or NaN.
    """
    shapes = _shapes(params, thresholds)
    gates = {}
    for path, value in thresholds.items():
        threshold = np.asarray(value, np.float64)
        if not (threshold >= 0).all():
            raise ValueError(f"threshold {value} of {path!r} must be 0 or positive")
        sparsity = None
        if quantiles is not None:
            sparsity = as_tuple(_histogram(quantiles, path).share_below(threshold))
        gates[path] = Gate(as_tuple(threshold), sparsity, shapes[path])
    score = "magnitude" if quantiles is None else quantiles.score
    return SparsityPlan("given thresholds", None, gates, score)


def recalibrate(
    fn: Callable[..., Any],
    params: Any,
    plan: SparsityPlan,
    batches: Iterable[Any],
    *,
    progress: bool = False,
) -> SparsityPlan:
    """The same sparsities with thresholds for the activations that the plan itself leaves.

    Thresholds from the dense model ignore too much: masked inputs make later activations smaller,
    by about two points at 50 %.

    Args:
      fn: ``fn(params, batch)``, as for :func:`lutjax.calibrate.activation_quantiles`.
      params: The parameters without gates.
      plan: Made from the dense model's quantiles; its sparsities must be known.
      batches: The calibration text.
      progress: Show a progress bar.

    Raises:
      ValueError: If the plan does not say which sparsity it expects of each weight.
    """
    if plan.sparsity is None:
        raise ValueError("the plan has no sparsities to keep; make it with quantiles")
    gated = sparsify(params, plan)
    found = activation_quantiles(fn, gated, batches, score=plan.score, progress=progress)
    sparsities = {path: np.asarray(gate.sparsity) for path, gate in plan.gates.items()}
    return _plan(plan.method, plan.target, params, sparsities, found)


def check_target(target: float) -> None:
    """Raises ValueError if a target is not in [0, 1)."""
    if not 0 <= target < 1:
        raise ValueError(f"target={target} is outside [0, 1); 0.5 ignores half of the activations")


def _plan(
    method: str,
    target: float | None,
    params: Any,
    sparsities: Mapping[str, Any],
    quantiles: ActivationQuantiles,
) -> SparsityPlan:
    shapes = _shapes(params, sparsities)
    gates = {}
    for path, sparsity in sparsities.items():
        histogram = _histogram(quantiles, path)
        threshold = histogram.threshold(sparsity)
        reached = histogram.share_below(threshold)
        gates[path] = Gate(as_tuple(threshold), as_tuple(reached), shapes[path])
    return SparsityPlan(method, target, gates, quantiles.score)


def _histogram(quantiles: ActivationQuantiles, path: str) -> MagnitudeHistogram:
    if path not in quantiles:
        raise ValueError(f"the calibration has no quantiles for {path!r}; calibrate this model")
    return quantiles[path]


def _shapes(params: Any, paths: Any) -> dict[str, tuple[int, ...]]:
    known = projections(params)
    for path in paths:
        if path not in known:
            similar = ", ".join(near_misses(path, known))
            raise ValueError(f"{path!r} is no projection of this model; similar paths: {similar}")
    return {path: tuple(leaf.shape) for path, leaf in named_leaves(params) if path in known}
