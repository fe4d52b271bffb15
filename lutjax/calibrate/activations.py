"""Quantiles of the activations that enter each projection."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, DenseArray, is_compressed
from lutjax.calibrate.histogram import BINS, SLOTS, MagnitudeHistogram, magnitude_counts
from lutjax.calibrate.observe import observer
from lutjax.files import json_by_line, replace_file
from lutjax.paths import named_leaves
from lutjax.progress import progress_bar
from lutjax.transforms.quantize import leaves_with_rules, weight_view
from lutjax.transforms.recipe import Recipe, Rule, without_missing_embeddings

Score = Literal["magnitude", "wina"]


@dataclasses.dataclass(frozen=True)
class ActivationQuantiles(Mapping[str, MagnitudeHistogram]):
    """A histogram of what is compared with a threshold, for each path.

    Attributes:
      histograms: By parameter path; stacked weights have one for each batch entry.
      score: ``"magnitude"`` for |x|, ``"wina"`` for |x| times the norm of the weight's row.
    """

    histograms: dict[str, MagnitudeHistogram]
    score: Score = "magnitude"

    def __getitem__(self, path: str) -> MagnitudeHistogram:
        """The histogram of a path."""
        return self.histograms[path]

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self.histograms)

    def __len__(self) -> int:
        """Number of paths."""
        return len(self.histograms)

    def __add__(self, other: ActivationQuantiles) -> ActivationQuantiles:
        """The statistics of both data sets, for the same weights.

        Raises:
          ValueError: If paths or scores differ.
        """
        if set(self) != set(other) or self.score != other.score:
            raise ValueError("statistics of different weights or scores cannot be added")
        return ActivationQuantiles({p: self[p] + other[p] for p in self}, self.score)

    def __repr__(self) -> str:
        """Number of weights, kind of score, and values seen."""
        seen = max((int(h.total.max()) for h in self.values()), default=0)
        return f"ActivationQuantiles({len(self)} weights, {self.score}, up to {seen:,} values each)"

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, at once: quartiles to read, counts to compute with."""
        weights = {}
        for name, histogram in self.items():
            batch = histogram.counts.shape[:-1]
            weights[name] = {
                "quartiles": [
                    np.round(histogram.quantile(p), 6).tolist() for p in (0.25, 0.5, 0.75)
                ],
                "batch": list(batch),
                "counts": [_trimmed(c) for c in histogram.counts.reshape(-1, BINS + 1)],
            }
        header = {"format": _FORMAT, "score": self.score}
        replace_file(path, json_by_line(header, "weights", weights))

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationQuantiles:
        """Reads what :meth:`save` wrote.

        Raises:
          ValueError: If the file is none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or data["score"] not in get_args(Score):
                raise ValueError(f"format {data['format']!r}, score {data['score']!r}")
            histograms = {
                name: MagnitudeHistogram(
                    np.stack([_untrimmed(c) for c in weight["counts"]]).reshape(
                        *weight["batch"], BINS + 1
                    )
                )
                for name, weight in data["weights"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no file of activation quantiles: {error}") from error
        return cls(histograms, data["score"])


def activation_quantiles(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    score: Score = "magnitude",
    recipe: Recipe | None = None,
    progress: bool = False,
) -> ActivationQuantiles:
    """Counts the magnitudes of the inputs of every projection.

    Streaming: a batch adds to histograms of 64 bins an octave, so any quantile is right within
    1/64 of itself, and the histograms of several runs add up.

    Args:
      fn: ``fn(params, batch)``, such as ``lambda p, tokens: model.apply({"params": p}, tokens)``;
        it is lifted, see :func:`lutjax.calibrate.observe` for what it may contain.
      params: Dense or compressed parameters.
      batches: What ``fn`` takes as its second argument; of one shape, or it compiles again.
      score: What to count: ``"magnitude"`` |x|, or ``"wina"`` |x| times the norm of the row of the
        weight that it meets.
      recipe: Which parameters; by default all matrices but embeddings, head and norms.
      progress: Show a progress bar.

    Returns:
      A histogram for each path.

    Raises:
      ValueError: If a rule matches nothing, there is no data, an activation is NaN or infinite, or
        a projection sees nothing; names the rule or the path.

    Source: TEAL (arXiv 2408.14690, section 4.2); WINA (arXiv 2505.19427).

    >>> x = jnp.linspace(-1.0, 1.0, 2001).reshape(-1, 1)
    >>> params = {"kernel": jnp.ones((1, 1))}
    >>> found = activation_quantiles(lambda p, x: x @ p["kernel"], params, [x])
    >>> round(found["kernel"].quantile(0.5).item(), 2)
    0.5
    """
    if score not in get_args(Score):
        raise ValueError(f"score={score!r} is unknown; use 'magnitude' or 'wina'")
    statistic = _count_magnitudes if score == "magnitude" else _count_weighted
    wraps = projections(params, recipe)
    step = observer(fn, tuple((path, (wrap, SLOTS, statistic)) for path, wrap in wraps.items()))
    totals: dict[str, np.ndarray] = {}
    for batch in progress_bar(batches, "activations", "batch", show=progress):
        for path, counts in step(params, batch).items():
            found = np.rint(np.asarray(counts, np.float64)).astype(np.int64)
            bad = int(found[..., -1].sum())
            if bad:
                raise ValueError(
                    f"{bad} activations that enter {path!r} are NaN or infinite; find the text or "
                    f"the weight that makes them before calibrating"
                )
            totals[path] = totals.get(path, 0) + found[..., :-1]
    if not totals:
        raise ValueError("batches is empty; give at least one")
    for path, total in totals.items():
        if not total.any():
            raise ValueError(f"nothing enters {path!r}: fn does not use it, or not differentiably")
    return ActivationQuantiles({p: MagnitudeHistogram(c) for p, c in totals.items()}, score)


@dataclasses.dataclass(frozen=True)
class AsCompressed:
    """A parameter to a compressed array, with the axes that a rule gives it; nothing is copied."""

    path: str
    rule: Rule

    def __call__(self, leaf: Any) -> CompressedArray:
        """The leaf itself if it is compressed."""
        if is_compressed(leaf):
            return leaf
        return DenseArray.of(leaf, *weight_view(leaf.shape, self.rule, self.path))


def projections(params: Any, recipe: Recipe | None = None) -> dict[str, AsCompressed]:
    """For each projection's path, the function from its weight to a compressed array.

    Raises:
      ValueError: If a rule matches nothing, or the recipe reaches no matrix.
      TypeError: If ``recipe`` is none.
    """
    recipe = Recipe.uniform() if recipe is None else recipe
    recipe = without_missing_embeddings(recipe, (path for path, _ in named_leaves(params)))
    found: dict[str, AsCompressed] = {}
    for path, leaf, rule in leaves_with_rules(recipe, params):
        matrix = jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2
        if is_compressed(leaf) or matrix:
            found[path] = AsCompressed(path, rule)
    if not found:
        raise ValueError("the recipe reaches no matrix; see Recipe.rule_for")
    return found


def row_norms(weight: CompressedArray) -> jax.Array:
    """Euclidean norms of the rows of the stored matrix, ``float32[*batch, K]``."""
    return jnp.linalg.norm(weight.materialize_matrix().astype(jnp.float32), axis=-1)


_FORMAT = "lutjax activation quantiles 1"


def _count_magnitudes(weight: CompressedArray, x: jax.Array) -> jax.Array:
    return magnitude_counts(x)


def _count_weighted(weight: CompressedArray, x: jax.Array) -> jax.Array:
    return magnitude_counts(x.astype(jnp.float32) * row_norms(weight)[None, :])


def _trimmed(counts: np.ndarray) -> list[int]:
    """The zeros, the first bin in use, and the counts from there to the last one in use."""
    used = np.flatnonzero(counts[:-1])
    first, end = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
    return [int(counts[-1]), first, *counts[first:end].tolist()]


def _untrimmed(values: list[int]) -> np.ndarray:
    zeros, first, *used = values
    counts = np.zeros(BINS + 1, np.int64)
    counts[first : first + len(used)] = used
    counts[-1] = zeros
    return counts
