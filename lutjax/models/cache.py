"""The key-value cache: an explicit pytree of static size, updated in place when donated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lutjax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one block, or of all blocks stacked on a leading axis.

    Attributes:
      keys: `[B * kv_heads, S, head_dim]` (rotated), or `[L, B * kv_heads, S, head_dim]`. Batch and
        heads are one axis because that is what a batched product on them is compiled to; with two,
        XLA on CPU copies the whole cache at every step.
      values: like `keys`.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a decoder remembers of the tokens it has read.

    Attributes:
      layers: one `LayerCache` per block, or a single stacked one if the layers are scanned.
      positions: int32 `[B, S]`, the position of the token in each slot; -1 marks an empty slot or
        padding, which no token attends to.
      next_slot: int32 scalar, the slot that the next token is written to. The caller keeps
        `next_slot` + new tokens ≤ S.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    positions: Int32[Array, "b s"]
    next_slot: Int32[Array, ""]

    @property
    def max_length(self) -> int:
        """The number of slots, S."""
        return self.positions.shape[-1]


def init_cache(
    config: DecoderConfig, batch: int, max_length: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache.

    Args:
      config: the decoder's configuration.
      batch: number of sequences, B.
      max_length: number of slots S; prompt (with padding) and new tokens must fit.
      dtype: dtype of the stored keys and values.

    Returns:
      The cache, with `2 * L * B * kv_heads * S * head_dim` zeros.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> cache = init_cache(config, batch=1, max_length=16)
    >>> len(cache.layers), cache.layers[0].keys.shape
    (3, (1, 16, 2))
    """
    shape = (batch * config.num_kv_heads, max_length, config.head_dim)

    def layer(shape: tuple[int, ...]) -> LayerCache:
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    layers = (
        layer((config.num_layers, *shape))
        if config.scan_layers
        else tuple(layer(shape) for _ in range(config.num_layers))
    )
    return KVCache(layers, jnp.full((batch, max_length), -1, jnp.int32), jnp.zeros((), jnp.int32))
