"""The key-value cache: an explicit pytree of static size, updated in place when donated."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from lutjax.models.config import DecoderConfig

Slots = Int32[Array, ""] | Int32[Array, "b t"]
"""Where a layer writes T tokens: from one slot on in all sequences, or, in a ring, to one each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one block, or of all blocks stacked on a leading axis.

    Attributes:
      keys: `[B * kv_heads, R, head_dim]` (rotated), or `[L, B * kv_heads, R, head_dim]`, for the R
        slots of `layer_slots`. Batch and heads are one axis because that is what a batched product
        on them is compiled to; with two, XLA on CPU copies the whole cache at every step.
      values: like `keys`.
    """

    keys: Float[Array, "..."]
    values: Float[Array, "..."]

    def extend(self, new: LayerCache, slots: Slots) -> tuple[LayerCache, LayerCache]:
        """Takes the keys and values of T new tokens into one block's cache.

        Args:
          new: `[B * kv_heads, T, head_dim]` each.
          slots: where they go, from `KVCache.place`.

        Returns:
          What the new tokens attend to, whose positions `KVCache.place` gave, and the new cache.
        """
        new = jax.tree.map(lambda a, old: a.astype(old.dtype), new, self)
        if slots.ndim == 0:
            start = (0, slots, 0)
            written = jax.tree.map(
                lambda old, a: lax.dynamic_update_slice(old, a, start), self, new
            )
            return written, written
        written = jax.tree.map(functools.partial(_write_ring, slots), self, new)
        if slots.shape[1] == 1:
            return written, written
        # The first of the new tokens may attend to what the last of them overwrite.
        return jax.tree.map(lambda *a: jnp.concatenate(a, axis=1), self, new), written


def _write_ring(
    slots: Int32[Array, "b t"], old: Float[Array, "bk r h"], new: Float[Array, "bk t h"]
) -> Float[Array, "bk r h"]:
    ring, new = (a.reshape(slots.shape[0], -1, *a.shape[1:]) for a in (old, new))
    # Mapped, not indexed by row: so a batch that is split over devices is written where it is.
    write = jax.vmap(lambda ring, new, slots: ring.at[:, slots].set(new, mode="drop"))
    return write(ring, new, slots).reshape(old.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a decoder remembers of the tokens it has read.

    A layer has a slot for each of the S tokens, padding included, and all sequences write their
    next token to the same slot. Layers with a sliding window of R < S tokens have a ring of R slots
    instead (see `layer_slots`): the token at position p of a sequence is written to slot p mod R,
    over the one that has just left the window, and padding is not written.

    Attributes:
      layers: one `LayerCache` per block, or a single stacked one if the layers are scanned.
      positions: int32 `[B, S]`, the position of the token in each slot; -1 marks an empty slot or
        padding, which no token attends to. What rings hold follows from the last position.
      next_slot: int32 scalar, the slot that the next token is written to. The caller keeps
        `next_slot` + new tokens ≤ S.
    """

    layers: tuple[LayerCache, ...] | LayerCache
    positions: Int32[Array, "b s"]
    next_slot: Int32[Array, ""]

    @property
    def max_length(self) -> int:
        """The number of slots of a layer that is no ring, S."""
        return self.positions.shape[-1]

    @property
    def last(self) -> Int32[Array, "b 1"]:
        """The position of each sequence's last token, -1 if there is none."""
        return jnp.max(self.positions, axis=1, keepdims=True)

    def advance(self, new: Int32[Array, "b t"]) -> KVCache:
        """Enters T tokens at the positions `new`, -1 for padding; `LayerCache.extend` follows."""
        positions = lax.dynamic_update_slice(self.positions, new, (0, self.next_slot))
        return KVCache(self.layers, positions, self.next_slot + new.shape[1])

    def place(
        self, positions: Int32[Array, "b t"], new: Int32[Array, "b t"], size: int
    ) -> tuple[Int32[Array, "b s"], Slots]:
        """Where a layer keeps the tokens entered last, and what they attend to.

        Args:
          positions: int32 `[B, T]`, those of the tokens; padding has that of the token before it.
          new: int32 `[B, T]`, what `advance` took: the same, but -1 for padding.
          size: how many slots the layer has (`layer_slots`): S, or R < S if it is a ring.

        Returns:
          The positions of the keys that the tokens attend to, below 0 for none: int32 `[B, S]`, or
          for a ring `[B, R]` if T is 1, and `[B, R + T]` if not. And where to write: the first of
          the slots that all sequences share, or for a ring a slot for each token, int32 `[B, T]`,
          which is R for those that are not written.
        """
        if size == self.max_length:
            return self.positions, self.next_slot - new.shape[1]
        last = positions[:, -1:]
        # Of more than R tokens only the last R are written, since no slot may be written twice.
        written = new > jnp.maximum(last - size, -1)
        slots = jnp.where(written, new % size, size)
        if new.shape[1] == 1:
            return _ring_positions(last, size), slots
        before = last - jnp.sum(new >= 0, axis=1, keepdims=True, dtype=jnp.int32)
        return jnp.concatenate([_ring_positions(before, size), new], axis=1), slots


def _ring_positions(last: Int32[Array, "b 1"], size: int) -> Int32[Array, "b r"]:
    """The position in each slot: the last one up to `last` that belongs there; empty if below 0."""
    return last - (last - jnp.arange(size, dtype=jnp.int32)[None]) % size


def layer_slots(config: DecoderConfig, windowed: bool, max_length: int) -> int:
    """How many slots a layer has in a cache of `max_length`; it is a ring if these are fewer.

    Layers with a sliding window need no more slots than it has tokens. Scanned layers are stacked,
    so they are rings only if all have the window.
    """
    if not windowed or (config.scan_layers and not all(config.windowed)):
        return max_length
    assert config.sliding_window is not None
    return min(config.sliding_window, max_length)


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
      The cache, with `2 * B * kv_heads * R * head_dim` zeros for each layer, where R is
      `sliding_window` if the layer is a ring (see `KVCache`), and S otherwise.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2, sliding_window=4,
    ...                        sliding_layers=(True, False))
    >>> cache = init_cache(config, batch=1, max_length=16)
    >>> [layer.keys.shape for layer in cache.layers]
    [(1, 4, 2), (1, 16, 2)]
    """

    def layer(slots: int, *stacked: int) -> LayerCache:
        shape = (*stacked, batch * config.num_kv_heads, slots, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    slots = [layer_slots(config, windowed, max_length) for windowed in config.windowed]
    layers = layer(slots[0], config.num_layers) if config.scan_layers else tuple(map(layer, slots))
    return KVCache(layers, jnp.full((batch, max_length), -1, jnp.int32), jnp.zeros((), jnp.int32))
