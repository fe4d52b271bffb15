"""Dense prefill, sparse decoding: which parameters a call of a decoder uses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PhasedParams:
    """Parameters of the two phases; they may share every buffer.

    Attributes:
      prefill: For the tokens of the prompt, usually the plain ones.
      decode: For the tokens that are generated, usually the gated ones.
    """

    prefill: Any
    decode: Any


def phased(apply_fn: Callable[..., Any], dense_prefill: float = 1.0) -> Callable[..., Any]:
    """A decoder's ``apply`` on :class:`PhasedParams`, for ``generate`` and the like.

    Calls with one token a sequence are decoding. Of the others, the first part runs on the plain
    parameters (the first tokens carry attention sinks), the rest on the gated ones. Without a cache
    there is nothing to hand from one part to the other, so ``dense_prefill`` must be 0 or 1 there.

    Args:
      apply_fn: A (lifted) decoder's ``apply``, ``apply_fn({"params": params}, tokens, cache=…)``.
      dense_prefill: The share of prompt tokens to run on the plain parameters: 1 is all of them,
        0.5 is how TEAL evaluates, 0 is none. Positions of padding count.

    Returns:
      A function of the same arguments; keep it, since every new one compiles anew.

    Raises:
      ValueError: If ``dense_prefill`` is outside [0, 1].

    Source: TEAL (arXiv 2408.14690, section 5.4).
    """
    if not 0 <= dense_prefill <= 1:
        raise ValueError(f"dense_prefill={dense_prefill} is outside [0, 1]")

    def apply(variables: Any, tokens: jax.Array, **kwargs: Any) -> Any:
        params: PhasedParams = variables["params"]
        time = tokens.shape[1]
        first = math.ceil(dense_prefill * time)
        if time == 1 and kwargs.get("cache") is not None:
            first = 0
        if first in (0, time):
            chosen = params.prefill if first else params.decode
            return apply_fn({**variables, "params": chosen}, tokens, **kwargs)
        cache, mask, at = (kwargs.pop(name, None) for name in ("cache", "mask", "logits_at"))
        if cache is None:
            raise ValueError(
                f"dense_prefill={dense_prefill} splits the {time} tokens, which needs a cache"
            )
        parts = []
        for chosen, start, stop in ((params.prefill, 0, first), (params.decode, first, time)):
            options = dict(kwargs)
            if mask is not None:
                options["mask"] = mask[:, start:stop]
            if at is not None:
                options["logits_at"] = jnp.clip(at - start, 0, stop - start - 1)
            logits, cache = apply_fn(
                {**variables, "params": chosen}, tokens[:, start:stop], cache=cache, **options
            )
            parts.append(logits)
        if at is None:
            return jnp.concatenate(parts, axis=1), cache
        return jnp.where((at < first)[:, :, None], *parts), cache

    return apply
