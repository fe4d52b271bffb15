"""Cyclic precision training: weights and activations at a bit width that goes up and down."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.paths import map_named, named_leaves, near_misses


def cyclic_bits(
    step: Array | int, *, low: int, high: int, steps: int, cycles: int = 32
) -> Float[Array, ""]:
    """Bits at a step: `rint(low + (high - low) (1 - cos(pi (t mod T) / T)) / 2)`.

    `T = steps / cycles` is the length of a cycle.

    Args:
      step: `t`; may be traced, so that a change of precision compiles nothing.
      low: Bits at the start of a cycle.
      high: Bits at its end.
      steps: Length of the training, at most 10^9.
      cycles: How many cycles it has.

    Source: CPT (arXiv 2101.09868, equation 1).

    >>> [int(cyclic_bits(t, low=3, high=8, steps=100, cycles=10)) for t in (0, 5, 9, 10)]
    [3, 6, 8, 3]
    """
    # (t mod T) / T is (cycles t mod steps) / steps: in integers, as rounded floats would put the
    # start of a cycle at its end. One binary digit of `cycles` at a time, nothing exceeds 3 steps.
    t = jnp.asarray(step).astype(jnp.uint32) % steps
    remainder = jnp.zeros_like(t)
    for digit in f"{cycles:b}":
        remainder = (2 * remainder + int(digit) * t) % steps
    phase = remainder.astype(jnp.float32) / steps
    return jnp.rint(low + (high - low) * (1 - jnp.cos(jnp.pi * phase)) / 2)


def fake_quantize(
    x: Float[Array, "..."], bits: Float[Array, ""], axes: Sequence[int] | None = None
) -> Float[Array, "..."]:
    """Rounds to `2^bits` evenly spaced values from min to max, with a straight-through gradient.

    Args:
      x: What is rounded.
      bits: May be traced.
      axes: The range is taken over these; over all of them by default.

    >>> fake_quantize(jnp.array([0.0, 0.4, 1.0]), jnp.asarray(1.0)).tolist()
    [0.0, 0.0, 1.0]
    """
    wide = x.astype(jnp.float32)
    low = wide.min(axis=axes, keepdims=True)
    step = (wide.max(axis=axes, keepdims=True) - low) / (2.0**bits - 1)
    safe = jnp.where(step > 0, step, 1.0)
    rounded = (jnp.rint((wide - low) / safe) * safe + low).astype(x.dtype)
    return x + jax.lax.stop_gradient(rounded - x)


def quantize_kernels(
    params: Any, bits: Float[Array, ""], targets: Sequence[str] = ("*layers/*kernel",)
) -> Any:
    """Fake-quantises matrices per output channel (their last axis); the rest stays.

    Args:
      params: A tree of dense weights.
      bits: May be traced.
      targets: Globs of the paths of the matrices; by default those of the blocks of
        :class:`lutjax.models.Decoder`.

    Raises:
      ValueError: If a target matches nothing.
    """
    paths = [path for path, _ in named_leaves(params)]
    for pattern in targets:
        if not fnmatch.filter(paths, pattern):
            near = near_misses(pattern, paths)
            raise ValueError(f"no parameter matches {pattern!r}; the nearest paths are {near}")

    def visit(path: str, leaf: Any) -> Any:
        chosen = any(fnmatch.fnmatchcase(path, pattern) for pattern in targets)
        return fake_quantize(leaf, bits, axes=(-2,)) if chosen else leaf

    return map_named(visit, params)


@contextlib.contextmanager
def quantized_activations(bits: Float[Array, ""]) -> Iterator[None]:
    """Within it, the input of every Flax dense layer of a block is fake-quantised per tensor.

    Blocks are Linen modules under one called ``layers``, as in :class:`lutjax.models.Decoder`.
    Gradients are not quantised.
    """

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        in_block = "layers" in context.module.path
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__" and in_block:
            args = (fake_quantize(args[0], bits), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def precision_range_test(gain_at: Callable[[int], float], threshold: float, high: int = 8) -> int:
    """The lowest bits that training makes progress with: `b_min` of :func:`cyclic_bits`.

    Args:
      gain_at: Trains for a while at so many bits and returns the averaged gain (how much the loss
        fell, or the accuracy rose).
      threshold: A gain that counts as progress.
      high: Highest bits to try.

    Returns:
      The first of 2, 3, ... whose gain passes the threshold.

    Raises:
      ValueError: When none does.

    Source: CPT (arXiv 2101.09868, section 3.3).

    >>> precision_range_test(lambda bits: 0.1 * bits, threshold=0.35)
    4
    """
    gains = {}
    for bits in range(2, high + 1):
        gains[bits] = gain_at(bits)
        if gains[bits] > threshold:
            return bits
    raise ValueError(f"no precision gains more than threshold={threshold}: {gains}; lower it")
