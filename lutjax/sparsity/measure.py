"""How sparse the inputs of gated weights really are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import GatedArray
from lutjax.calibrate.observe import observer
from lutjax.paths import named_leaves


@dataclasses.dataclass(frozen=True)
class AchievedSparsity:
    """The share of activations that gates ignored; prints as a table.

    Attributes:
      shares: By path, ``[*batch]``; NaN for an expert that no row met.
      sizes: Number of weights by path.
    """

    shares: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]

    @property
    def overall(self) -> float:
        """The share of gated weights that met ignored activations."""
        total = sum(self.sizes.values())
        return sum(float(np.nanmean(s)) * self.sizes[p] for p, s in self.shares.items()) / total

    def __str__(self) -> str:
        """A line for each weight, and the share of all."""
        width = max([len(path) for path in self.shares] + [len("all gated weights")])
        lines = [f"{'weight':<{width}}  ignored"]
        lines += [
            f"{p:<{width}}  {100 * float(np.nanmean(s)):5.1f} %" for p, s in self.shares.items()
        ]
        lines.append(f"{'all gated weights':<{width}}  {100 * self.overall:5.1f} %")
        return "\n".join(lines)


def measure_sparsity(
    fn: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> AchievedSparsity:
    """Runs a function on gated parameters and counts what the gates ignore.

    Args:
      fn: ``fn(params, batch)``; see :func:`lutjax.calibrate.observe` for what it may contain.
      params: Parameters from :func:`lutjax.sparsity.sparsify`.
      batches: What ``fn`` takes as its second argument.

    Raises:
      ValueError: If no parameter has a gate, or there is no data.
    """
    gated = {path: leaf for path, leaf in named_leaves(params) if isinstance(leaf, GatedArray)}
    if not gated:
        raise ValueError("no parameter has a gate; use sparsify(params, plan) first")
    step = observer(fn, tuple((path, (_same, 2, _count)) for path in gated))
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for path, counts in step(params, batch).items():
            totals[path] = totals.get(path, 0) + np.asarray(counts, np.float64)
    if not totals:
        raise ValueError("batches is empty; give at least one")
    with np.errstate(invalid="ignore"):  # 0 / 0 for an expert that no row met
        shares = {path: count[..., 0] / count[..., 1] for path, count in totals.items()}
    return AchievedSparsity(shares, {path: gated[path].size for path in shares})


def _same(leaf: Any) -> Any:
    return leaf


def _count(weight: Any, x: jax.Array) -> jax.Array:
    ignored = jnp.sum(weight.ignored(x), dtype=jnp.int32)
    return jnp.stack([ignored.astype(jnp.float32), jnp.float32(x.size)])
