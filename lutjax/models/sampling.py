"""Choosing the next token from logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

_EXCLUDED = -jnp.inf
# Processors may take smaller temperatures for 0.
_TINY = jnp.finfo(jnp.float32).tiny


@functools.partial(jax.jit, static_argnames="top_k")
def sample(
    logits: Float32[Array, "b v"],
    key: Array,
    temperature: Float32[Array, ""] | float,
    top_k: int | None = None,
    top_p: Float32[Array, ""] | float | None = None,
) -> Int32[Array, " b"]:
    """Draws tokens from softmax(logits / temperature), restricted to the likeliest.

    Args:
      logits: float32 `[B, V]`.
      key: a `jax.random.key`.
      temperature: positive; below 1 sharpens, above 1 flattens.
      top_k: keep the `top_k` likeliest tokens (and any that tie with the last); all if None.
      top_p: keep the smallest set of likeliest tokens whose probability reaches `top_p`, after
        `top_k` (arXiv 1904.09751); the lowest indices if several tie with the last; all if None.

    Returns:
      int32 `[B]`.

    >>> logits = jnp.array([[0.0, 3.0, 1.0]])
    >>> int(sample(logits, jax.random.key(0), 1.0, top_k=1)[0])
    1
    """
    temperature = jnp.maximum(jnp.asarray(temperature, jnp.float32), _TINY)
    # From the row's maximum down, nothing overflows that could still be drawn.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, _EXCLUDED, logits)
    if top_p is not None:
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        # A token is kept while the mass before it is below top_p: always at least the first.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < jnp.asarray(top_p, jnp.float32)).at[:, 0].set(True)
        kept = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, _EXCLUDED)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@jax.jit
def greedy(logits: Float32[Array, "b v"]) -> Int32[Array, " b"]:
    """The likeliest token of each row; the lowest index if several tie.

    Args:
      logits: float32 `[B, V]`.

    Returns:
      int32 `[B]`.
    """
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
