"""A decoder taken apart into its blocks, for methods that work on one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from lutjax.models.config import DecoderConfig
from lutjax.models.decoder import AttentionContext, Block, _attention_mask
from lutjax.models.rope import rope_frequencies, rope_tables


def decoder_blocks(
    config: DecoderConfig, params: Any, tokens: Int32[Array, "b t"]
) -> tuple[Callable[[Any, Array], Array], dict[str, Any], Float[Array, "b t d"]]:
    """The blocks of an unrolled decoder.

    Args:
      config: The decoder's configuration, without `scan_layers` (see `unstack_layers`).
      params: Its parameters; the embedding table must be dense.
      tokens: int32 `[B, T]`, without padding.

    Returns:
      `fn(block_params, x) -> y`, the same for every block and any number of sequences; the
      parameters of each block by path, in order; and the input of the first block. `y` of one
      block is `x` of the next.

    Raises:
      ValueError: if the layers are stacked.
    """
    if config.scan_layers:
        raise ValueError("the layers are stacked; use unstack_layers and scan_layers=False")
    block = Block(config)

    def fn(block_params: Any, x: Array) -> Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        context = AttentionContext(
            *rope_tables(positions, rope_frequencies(config)),
            mask=_attention_mask(positions, positions, config.sliding_window),
            slot=None,
        )
        return block.apply({"params": block_params}, x, None, context)[0]

    blocks = {f"layers/{i}": params["layers"][str(i)] for i in range(config.num_layers)}
    x = jnp.take(params["embed_tokens"]["embedding"], tokens, axis=0).astype(config.dtype)
    return fn, blocks, x
