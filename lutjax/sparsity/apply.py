"""Parameters to gated parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from lutjax.arrays import GatedArray
from lutjax.calibrate.activations import projections, row_norms
from lutjax.paths import map_named, near_misses
from lutjax.sparsity.plan import SparsityPlan


def sparsify(params: Any, plan: SparsityPlan) -> Any:
    """Puts a gate before each weight that a plan names.

    The weights themselves are shared with ``params``: a program that holds both (prefill on the
    plain ones, decode on the gated ones) holds every weight once.

    Args:
      params: Dense or compressed parameters; run the result with :func:`lutjax.lift`.
      plan: Which threshold for which path.

    Returns:
      A pytree like ``params`` with a :class:`lutjax.arrays.GatedArray` at each path of the plan.

    Raises:
      ValueError: If a path does not exist, a shape differs (the plan is another model's), or a
        weight is gated already.

    >>> import jax.numpy as jnp
    >>> from lutjax.sparsity import Gate
    >>> plan = SparsityPlan("by hand", None, {"kernel": Gate(0.5, None, (2, 2))})
    >>> gated = sparsify({"kernel": jnp.eye(2)}, plan)["kernel"]
    >>> (jnp.array([[0.25, 1.0]]) @ gated).tolist()
    [[0.0, 1.0]]
    """
    wraps = projections(params)
    missing = [path for path in plan.gates if path not in wraps]
    if missing:
        similar = ", ".join(near_misses(missing[0], wraps))
        raise ValueError(
            f"the plan names {missing[0]!r}, which is no projection of this model (and "
            f"{len(missing) - 1} more); similar paths: {similar}"
        )

    def gate(path: str, leaf: Any) -> Any:
        if path not in plan.gates:
            return leaf
        entry = plan.gates[path]
        if tuple(leaf.shape) != tuple(entry.shape):
            raise ValueError(
                f"the plan was made for {path!r} of shape {tuple(entry.shape)}, but here it has "
                f"shape {tuple(leaf.shape)}: the plan belongs to another model"
            )
        weight = wraps[path](leaf)
        if isinstance(weight, GatedArray):
            raise ValueError(f"{path!r} has a gate already; apply the plan to the plain parameters")
        threshold = np.asarray(entry.threshold, np.float32)
        norms = row_norms(weight) if plan.score == "wina" else None
        try:
            return GatedArray.of(weight, threshold, norms)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error

    return map_named(gate, params)
