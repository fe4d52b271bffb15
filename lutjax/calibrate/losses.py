"""Losses for calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def next_token_loss(
    apply_fn: Callable[..., Any],
) -> Callable[[Any, Int[Array, "*b t"]], Float[Array, ""]]:
    """The mean negative log-likelihood, in nats, of the tokens after the first of each sequence.

    Args:
      apply_fn: ``Decoder.apply`` or a function with its signature, lifted for compressed params.

    Returns:
      A function of parameters and token ids, ``int[T]`` of one sequence or ``int[B, T]``.

    >>> uniform = lambda variables, tokens: jnp.zeros((*tokens.shape, 8))
    >>> round(float(next_token_loss(uniform)({}, jnp.arange(4))), 3)
    2.079
    """

    def loss(params: Any, tokens: Int[Array, "*b t"]) -> Float[Array, ""]:
        if tokens.ndim == 0:
            raise ValueError(
                "tokens is a single number, not a sequence; a batch of samples is int[B, T]"
            )
        tokens = tokens.reshape(-1, tokens.shape[-1])
        logits = apply_fn({"params": params}, tokens)[:, :-1].astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    return loss


def kl_divergence(
    logits: Float[Array, "*rows n"], targets: Float[Array, "*rows n"]
) -> Float[Array, ""]:
    """How far the distributions of two arrays of logits differ: the mean of KL(targets ‖ logits).

    Args:
      logits: Of the distributions to judge.
      targets: Logits of what they should be.

    Returns:
      The mean over all rows, in nats.

    Raises:
      ValueError: If the shapes differ.

    >>> round(float(kl_divergence(jnp.log(jnp.array([0.25, 0.75])), jnp.zeros(2))), 4)
    0.1438
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits have shape {logits.shape} and targets {targets.shape}")
    found, aim = (jax.nn.log_softmax(a.astype(jnp.float32), axis=-1) for a in (logits, targets))
    return jnp.mean(jnp.sum(jnp.exp(aim) * (aim - found), axis=-1))
