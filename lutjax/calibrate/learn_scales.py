"""Learning the scales of quantised weights: outputs are to stay those of the dense model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lutjax.arrays import (
    LutArray,
    PackedLutArray,
    QuantizedScales,
    RowLutArray,
    quantize_scales_like,
)
from lutjax.calibrate.losses import kl_divergence
from lutjax.lift import lift
from lutjax.paths import map_named, named_leaves
from lutjax.progress import progress_bar
from pallas_kernels.scales import expanded


def learn_scales(
    fn: Callable[[Any, Any], Any],
    params: Any,
    dense: Any,
    batches: Iterable[Any],
    *,
    loss: Callable[[Array, Array], Float[Array, ""]] = kl_divergence,
    epochs: int = 1,
    learning_rate: float = 3e-3,
    progress: bool = False,
) -> Any:
    """Trains the scales of quantised weights such that outputs are like those of the dense model.

    Codes, tables and all other parameters stay as they are, and so do the form, the size and the
    speed of the result. What is trained, by Adam with cosine decay, are logarithms of factors, so
    scales keep their signs and small and large ones learn alike; outputs are those of scales as
    they are stored, rounded. For another objective or optimiser, see :func:`rescale`.

    A step takes the memory and time of one of training, without what an optimiser holds for all
    weights, and an output of the dense model.

    Args:
      fn: ``fn(params, batch)``, by default to logits; it is lifted.
      params: Compressed parameters, before :func:`lutjax.prepack`. A weight under two paths becomes
        two that learn apart.
      dense: The parameters that they stand for, for outputs to aim at.
      batches: What ``fn`` takes as its second argument; of one shape, or it compiles again. An
        epoch takes them in this order.
      loss: Of an output and what it should be: by default the divergence of the distributions.
      epochs: How often each batch is used.
      learning_rate: At the start, relative to the scales.
      progress: Show a progress bar.

    Returns:
      The parameters with other scales.

    Raises:
      ValueError: If there are no batches or no quantised weights, an argument is out of range, or a
        loss is not finite.

    Source: FLUTE (arXiv 2407.10960, section 4), which trains scales for the next token and rounds
    again after every step; distilling from the dense model needs no labels.

    >>> import lutjax
    >>> x = jax.random.normal(jax.random.key(0), (64, 32))
    >>> dense = {"kernel": jax.random.normal(jax.random.key(1), (32, 8))}
    >>> def error(params):
    ...     return float(kl_divergence(x @ params["kernel"], x @ dense["kernel"]))
    >>> small = lutjax.quantize(dense, bits=2, group_size=32)
    >>> def fn(params, x):
    ...     return x @ params["kernel"]
    >>> learnt = learn_scales(fn, small, dense, [x], epochs=50, learning_rate=0.03)
    >>> error(learnt) < 0.75 * error(small)
    True
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give at least one")
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate={learning_rate} must be a positive number")
    factors = scale_factors(params)
    lifted = lift(fn)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * len(batches)))

    def objective(factors: Any, params: Any, dense: Any, batch: Any) -> jax.Array:
        aim = jax.lax.stop_gradient(lifted(dense, batch))
        return loss(lifted(rescale(params, factors), batch), aim)

    @jax.jit
    def step(factors: Any, state: Any, params: Any, dense: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(objective)(factors, params, dense, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(factors, updates), state, value

    state = optimizer.init(factors)
    steps = [batch for _ in range(epochs) for batch in batches]
    for number, batch in enumerate(progress_bar(steps, "learn scales", "step", show=progress)):
        factors, state, value = step(factors, state, params, dense, batch)
        if not math.isfinite(float(value)):
            fix = "lower learning_rate" if number else "the model or the data is not sound"
            raise ValueError(f"step {number}: the loss is {float(value)}; {fix}")
    # A weight that had no gradient is not rounded again either.
    moved = {path: factor for path, factor in factors.items() if factor.any()}
    return _with_scales(params, moved, _stored)


def scale_factors(params: Any) -> dict[str, Float[Array, "*batch g n"]]:
    """Zeros for the scales of each quantised weight, wherever it is part of a compressed one.

    Args:
      params: Compressed parameters, before :func:`lutjax.prepack`.

    Returns:
      By the path of each :class:`LutArray`, float32 of the shape of its scales.

    Raises:
      ValueError: If there is no such weight, or one is prepacked.
    """
    found = {}
    for path, leaf in named_leaves(params, _has_codes):
        if isinstance(leaf, LutArray):
            found[path] = jnp.zeros(leaf.scales.shape, jnp.float32)
        elif _has_codes(leaf):
            raise ValueError(f"{path} is prepacked: {leaf!r}; learn first, then prepack")
    if not found:
        raise ValueError("params has no lookup-table weights with scales to learn; quantize first")
    return found


def rescale(params: Any, factors: Mapping[str, Float[Array, "*batch g n"]]) -> Any:
    """Multiplies scales by ``exp(factor)``: the function to differentiate for losses of your own.

    Args:
      params: Compressed parameters.
      factors: Of the form that :func:`scale_factors` gives; weights that it lacks stay.

    Returns:
      The parameters, with float32 scales where there is a factor. They have the values that can be
      stored as the scales were; gradients are those without that rounding.

    Raises:
      ValueError: If a path is that of no quantised weight, or a shape differs.

    >>> import lutjax
    >>> params = {"kernel": lutjax.quantize(jnp.eye(32), bits=2, group_size=16)}
    >>> double = {path: f + jnp.log(2.0) for path, f in scale_factors(params).items()}
    >>> float(rescale(params, double)["kernel"].materialize()[0, 0])
    2.0
    """

    def straight_through(scales: jax.Array, old: Any) -> jax.Array:
        stored = _stored(scales, old)
        return scales + jax.lax.stop_gradient(expanded(stored).astype(jnp.float32) - scales)

    return _with_scales(params, factors, straight_through)


def _has_codes(leaf: Any) -> bool:
    return isinstance(leaf, (LutArray, PackedLutArray, RowLutArray))


def _with_scales(
    params: Any, factors: Mapping[str, jax.Array], change: Callable[[jax.Array, Any], Any]
) -> Any:
    """Puts ``change(scales times exp(factor), old scales)`` where there is a factor."""
    unknown = set(factors)

    def one(path: str, leaf: Any) -> Any:
        if path not in factors or not isinstance(leaf, LutArray):
            return leaf
        unknown.discard(path)
        scales, factor = expanded(leaf.scales).astype(jnp.float32), factors[path]
        if factor.shape != scales.shape:
            raise ValueError(
                f"{path}: factors of shape {factor.shape} for scales of shape {scales.shape}"
            )
        return dataclasses.replace(leaf, scales=change(scales * jnp.exp(factor), leaf.scales))

    changed = map_named(one, params, is_leaf=_has_codes)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is the path of no lookup-table weight")
    return changed


def _stored(scales: jax.Array, like: jax.Array | QuantizedScales) -> jax.Array | QuantizedScales:
    """Scales in the form in which others are stored."""
    if isinstance(like, QuantizedScales):
        return quantize_scales_like(scales, like)
    return scales.astype(like.dtype)
