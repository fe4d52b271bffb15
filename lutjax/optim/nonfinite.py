"""Gradients with NaN or infinity: name the parameter, and skip the step if asked to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from lutjax.paths import path_string


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      inner: State of the inner transformation.
      skipped: Steps that were skipped.
      last: Leaf that caused the last skip, by its position among the leaves; -1 if none was.
    """

    inner: Any
    skipped: Int32[Array, ""]
    last: Int32[Array, ""]


def first_nonfinite(tree: Any) -> Int32[Array, ""]:
    """Position of the first leaf with NaN or infinity, -1 if all are finite; works under jit.

    >>> int(first_nonfinite({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.nan])}))
    1
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.asarray(-1, jnp.int32)
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def leaf_name(tree: Any, position: int) -> str:
    """The path of the leaf at a position.

    >>> leaf_name({"a": 1, "b": {"c": 2}}, 1)
    'b/c'
    """
    return path_string(jax.tree_util.tree_leaves_with_path(tree)[position][0])


def check_finite(gradients: Any) -> None:
    """Raises when a gradient has NaN or infinity.

    Raises:
      FloatingPointError: Naming the first such parameter.
    """
    position = int(first_nonfinite(gradients))
    if position >= 0:
        raise FloatingPointError(
            f"the gradient of {leaf_name(gradients, position)!r} has NaN or infinite entries; "
            "lower the learning rate, or wrap the optimiser in skip_nonfinite"
        )


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips steps whose gradients have NaN or infinity: zero updates, the inner state untouched.

    Args:
      inner: Any optax transformation.

    Returns:
      A transformation whose state counts the skipped steps and remembers the last cause:
      ``leaf_name(params, int(state.last))``.

    >>> optimizer = skip_nonfinite(optax.sgd(1.0))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, state = optimizer.update({"w": jnp.array([1.0, jnp.nan])}, optimizer.init(params))
    >>> updates["w"].tolist(), int(state.skipped), leaf_name(params, int(state.last))
    ([0.0, 0.0], 1, 'w')
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipNonfiniteState:
        zero = jnp.zeros((), jnp.int32)
        return SkipNonfiniteState(inner.init(params), zero, zero - 1)

    def update(updates: Any, state: SkipNonfiniteState, params: Any = None, **extra: Any) -> Any:
        position = first_nonfinite(updates)
        good = position < 0

        def step() -> Any:
            return inner.update(updates, state.inner, params, **extra)

        def skip() -> Any:
            # In the dtypes of a step, which need not be those of the gradients and of the state.
            wanted, wanted_inner = jax.eval_shape(step)
            return optax.tree.zeros_like(wanted), jax.tree.map(
                lambda new, old: old if new.dtype == old.dtype else old.astype(new.dtype),
                wanted_inner,
                state.inner,
            )

        # A branch, not a select: with a select a projection refreshed from NaN would be computed.
        # What is skipped stands second: XLA copies what the first branch hands through.
        new_updates, new_inner = jax.lax.cond(good, step, skip)
        skipped = state.skipped + (~good).astype(jnp.int32)
        return new_updates, SkipNonfiniteState(
            new_inner, skipped, jnp.where(good, state.last, position)
        )

    return optax.GradientTransformationExtraArgs(init, update)
