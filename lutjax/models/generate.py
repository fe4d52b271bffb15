"""Text generation: a jitted prefill, a jitted step, and the loop around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from lutjax.models.cache import KVCache, init_cache
from lutjax.models.config import DecoderConfig
from lutjax.models.decoder import CHUNK
from lutjax.models.sampling import greedy, sample

ApplyFn = Callable[..., Any]
"""`Decoder.apply`, or any function with its signature.

It is a static argument of the jitted functions below: pass the same object each time, or they
compile again.
"""

_PROMPT_BUCKET = 16
_CACHE_BUCKET = 64


@functools.partial(jax.jit, static_argnames="apply_fn", donate_argnames="cache")
def prefill(
    params: Any,
    tokens: Int32[Array, "b t"],
    mask: Bool[Array, "b t"],
    cache: KVCache,
    *,
    apply_fn: ApplyFn,
) -> tuple[Float32[Array, "b v"], KVCache]:
    """Reads padded prompts and predicts the token after each one's last.

    Args:
      params: the decoder's parameters.
      tokens: int32 `[B, T]`, padded on either side.
      mask: bool `[B, T]`, False where `tokens` is padding.
      cache: an empty cache with at least T slots; donated.
      apply_fn: `Decoder.apply` or a function with its signature.

    Returns:
      float32 logits `[B, V]` and the filled cache.
    """
    # The last real token: the head, the largest matrix, is applied to no other.
    last = tokens.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    logits, cache = apply_fn(
        {"params": params}, tokens, cache=cache, mask=mask, logits_at=last[:, None]
    )
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="apply_fn", donate_argnames="cache")
def decode_step(
    params: Any, tokens: Int32[Array, " b"], cache: KVCache, *, apply_fn: ApplyFn
) -> tuple[Float32[Array, "b v"], KVCache]:
    """Reads one more token of each sequence and predicts the next.

    Args:
      params: the decoder's parameters.
      tokens: int32 `[B]`.
      cache: what was read before, with a free slot; donated, so that it is updated in place.
      apply_fn: `Decoder.apply` or a function with its signature.

    Returns:
      float32 logits `[B, V]` and the new cache.
    """
    logits, cache = apply_fn({"params": params}, tokens[:, None], cache=cache)
    return logits[:, 0], cache


def generate(
    apply_fn: ApplyFn,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues a batch of prompts.

    Prompt and cache lengths are rounded up, so that prompts of similar lengths share one
    compilation: up to 512 tokens to a power of two, from there to a multiple of 512. The decoder
    reads 512 tokens of a prompt at a time, so that memory grows with its length, not the square.

    Args:
      apply_fn: `Decoder.apply` or a function with its signature; pass the same object each time.
      params: the decoder's parameters.
      prompts: token ids of each prompt; lengths may differ.
      config: the decoder's configuration.
      max_new_tokens: how many tokens to add at most, at least 1.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn (see `sample`).
      top_k: draw from the `top_k` likeliest tokens only.
      top_p: draw from the likeliest tokens that together reach this probability only.
      key: a `jax.random.key`, needed if `temperature` is not 0.
      stop_tokens: tokens that end a sequence; they are not part of the result.
      on_token: called with (index of the prompt, token) for each new token, as soon as it is known.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: if a prompt is empty or has an unknown token, if prompt and new tokens exceed the
        model's context, or if a sampling argument is out of range.

    >>> from lutjax.models import Decoder
    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> model = Decoder(config)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> out = generate(model.apply, params, [[1, 2], [3]], config=config, max_new_tokens=3)
    >>> [len(tokens) for tokens in out]
    [3, 3]
    """
    _check_prompts(prompts, config, max_new_tokens)
    _check_sampling(temperature, top_k, top_p, key)
    tokens, mask = _pad(prompts)
    slots = _round_up(tokens.shape[1] + max_new_tokens, _CACHE_BUCKET)
    cache = init_cache(config, len(prompts), slots, config.dtype)
    logits, cache = prefill(params, tokens, mask, cache, apply_fn=apply_fn)

    results: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        if temperature == 0:
            chosen = greedy(logits)
        else:
            assert key is not None
            chosen = sample(logits, jax.random.fold_in(key, step), temperature, top_k, top_p)
        if step + 1 < max_new_tokens:
            # Dispatched before the host looks at `chosen`, so that the device does not wait; a
            # stop token wastes this one step.
            logits, cache = decode_step(params, chosen, cache, apply_fn=apply_fn)
        for row, token in enumerate(np.asarray(chosen).tolist()):
            running[row] = running[row] and token not in stop_tokens
            if running[row]:
                results[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        if not any(running):
            break
    return results


def _check_prompts(
    prompts: Sequence[Sequence[int]], config: DecoderConfig, max_new_tokens: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not len(prompts):
        raise ValueError("prompts is empty; pass at least one prompt")
    for i, prompt in enumerate(prompts):
        if np.ndim(prompt) != 1:
            raise TypeError(
                f"prompt {i} is {prompt!r}; prompts are lists of token ids, such as "
                "[tokenizer.encode(text)]"
            )
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} has a token outside 0 … {config.vocab_size - 1}: "
                f"{min(prompt) if min(prompt) < 0 else max(prompt)}"
            )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that "
                f"exceeds the model's context of {config.max_position_embeddings}"
            )


def _check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, key: Array | None
) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 or a positive number")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random; pass key=jax.random.key(…)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")


def _pad(
    prompts: Sequence[Sequence[int]],
) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Pads on the right to a power of two, at least 16, or to whole chunks of the decoder."""
    longest = max(len(prompt) for prompt in prompts)
    if longest > CHUNK:
        time = _round_up(longest, CHUNK)
    else:
        time = max(_PROMPT_BUCKET, 1 << (longest - 1).bit_length())
    tokens = np.zeros((len(prompts), time), np.int32)
    mask = np.zeros((len(prompts), time), np.bool_)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return tokens, mask


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
