"""A decoder taken apart into its blocks, for methods that work on one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lutjax.models.config import DecoderConfig
from lutjax.models.decoder import Block, attention_contexts, embed
from lutjax.tracing import concrete

BlockFn = Callable[[Any, Array], Array]
"""`fn(block_params, x) -> y`, for any number of sequences."""


def decoder_blocks(
    config: DecoderConfig, params: Any, tokens: Int32[Array, "b t"]
) -> tuple[dict[str, BlockFn], dict[str, Any], Float[Array, "b t d"]]:
    """The blocks of an unrolled decoder.

    Args:
      config: The decoder's configuration, without `scan_layers` (see `unstack_layers`).
      params: Its parameters; the embedding table must be dense.
      tokens: int32 `[B, T]`, without padding.

    Returns:
      The function of each block by path, the same object for all blocks that compute alike (those
      with a sliding window, and those without); the parameters of each block by path, in order;
      and the input of the first block. `y` of one block is `x` of the next.

    Raises:
      ValueError: if the layers are stacked, there are none in `params`, or `tokens` are not
        `[B, T]` of the vocabulary, which is not known of traced ones.
    """
    if config.scan_layers:
        raise ValueError("the layers are stacked; use unstack_layers and scan_layers=False")
    if "layers" not in params:
        raise ValueError(f"params has {', '.join(params)} but no layers; give variables['params']")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens of shape {tokens.shape} and dtype {tokens.dtype} must be integers [B, T]"
        )
    numbers = concrete(tokens)
    if numbers is not None and ((numbers < 0) | (numbers >= config.vocab_size)).any():
        raise ValueError(
            f"tokens go from {numbers.min()} to {numbers.max()}; those of this model are "
            f"0 … {config.vocab_size - 1}"
        )
    block = Block(config)

    def run(windowed: bool, block_params: Any, x: Array) -> Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        contexts = attention_contexts(config, positions, positions)
        return block.apply({"params": block_params}, x, None, contexts[windowed])[0]

    kinds = {windowed: functools.partial(run, windowed) for windowed in set(config.windowed)}
    fns: dict[str, BlockFn] = {
        f"layers/{i}": kinds[windowed] for i, windowed in enumerate(config.windowed)
    }
    blocks = {path: params["layers"][path.removeprefix("layers/")] for path in fns}
    x = embed(config, jnp.take(params["embed_tokens"]["embedding"], tokens, axis=0))
    return fns, blocks, x


def functions_by_block(
    fn: BlockFn | Mapping[str, BlockFn], blocks: Mapping[str, Any]
) -> Mapping[str, BlockFn]:
    """The function of each block, where `fn` may be one for all of them.

    Raises:
      ValueError: if a block has none.
    """
    if not isinstance(fn, Mapping):
        return dict.fromkeys(blocks, fn)
    missing = [path for path in blocks if path not in fn]
    if missing:
        raise ValueError(f"fn has no function for the block {missing[0]!r}")
    return fn
