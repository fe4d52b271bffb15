"""SPAM: Adam with spike-aware clipping and momentum resets."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from lutjax.tracing import concrete


class ScaleBySpamState(NamedTuple):
    """State of :func:`scale_by_spam`: steps so far and the two moments."""

    count: Int32[Array, ""]  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_spam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    threshold: float = 5000.0,
    reset_every: int = 500,
    warmup: int = 150,
    clip_after: int = 20,
) -> optax.GradientTransformation:
    """Adam whose gradients are clipped entry by entry where they spike, and whose moments restart.

    An entry with `g^2 > threshold v` becomes `sign(g) sqrt(threshold v)`; unlike in the paper, not
    where `v` is 0: an entry that had no gradient so far would never move again. Every `reset_every`
    steps both moments and the steps that bias correction counts go to zero; the updates after it
    grow over `warmup` steps by a cosine, `1 - (1 + cos(pi (s + 1) / (warmup + 1))) / 2` for the
    s-th.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      threshold: The paper's `theta`.
      reset_every: The paper's `Delta T`.
      warmup: Steps of reduced updates after a reset.
      clip_after: Steps after a reset before `v` is reliable enough to clip by.

    Raises:
      ValueError: For `reset_every` < 1.

    Source: SPAM (arXiv 2501.06842, algorithm 1).

    >>> optimizer = scale_by_spam(reset_every=100)
    >>> state = optimizer.init(jnp.ones(3))
    >>> updates, state = optimizer.update(jnp.ones(3), state)
    >>> updates.round(3).tolist()
    [1.0, 1.0, 1.0]
    """
    known = concrete(reset_every)  # injected ones are traced
    if known is not None and known < 1:
        raise ValueError(f"reset_every={reset_every} must be at least 1")

    def init(params: Any) -> ScaleBySpamState:
        return ScaleBySpamState(
            jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        )

    def update(updates: Any, state: ScaleBySpamState, params: Any = None) -> Any:
        del params
        age = state.count % reset_every  # steps since the last reset
        keep = age > 0
        clipping = age >= clip_after

        def clip(g: Array, v: Array) -> Array:
            limit = jnp.sqrt(threshold * v)
            spikes = clipping & (v > 0) & (jnp.abs(g) > limit)
            return jnp.where(spikes, jnp.sign(g) * limit, g)

        # Not a product: what has overflowed is cleared as well.
        mu, nu = (jax.tree.map(lambda m: jnp.where(keep, m, 0), m) for m in state[1:])
        clipped = jax.tree.map(lambda g, v: clip(g, v.astype(g.dtype)), updates, nu)
        mu = optax.tree.update_moment(clipped, mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(clipped, nu, b2, 2)
        steps = (age + 1).astype(jnp.result_type(float))
        growth = 1 - (1 + jnp.cos(jnp.pi * steps / (warmup + 1))) / 2
        warm = (state.count < reset_every) | (age >= warmup)
        factor = jnp.where(warm, 1.0, growth)

        def direction(m: Array, v: Array) -> Array:
            m = m / (1 - b1**steps).astype(m.dtype)
            v = v / (1 - b2**steps).astype(v.dtype)
            return factor.astype(m.dtype) * m / (jnp.sqrt(v) + eps)

        new_updates = jax.tree.map(direction, mu, nu)
        return new_updates, ScaleBySpamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


def spam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    threshold: float = 5000.0,
    reset_every: int = 500,
    warmup: int = 150,
) -> optax.GradientTransformation:
    """SPAM with a learning rate; see :func:`scale_by_spam`.

    Args:
      learning_rate: Fixed, or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      threshold: A gradient above its root mean square times the root of this is a spike.
      reset_every: Steps between momentum resets.
      warmup: Steps of reduced updates after a reset.

    Source: SPAM (arXiv 2501.06842).
    """
    return optax.chain(
        scale_by_spam(b1, b2, eps, threshold, reset_every, warmup),
        optax.scale_by_learning_rate(learning_rate),
    )
