"""A plain Flax decoder: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 by configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from lutjax.models.cache import KVCache, LayerCache
from lutjax.models.config import DecoderConfig
from lutjax.models.rope import apply_rope, rope_frequencies, rope_tables

# Finite, so that a row of padding, which may attend to nothing, gets no NaN.
_MASKED = -1e30


class AttentionContext(NamedTuple):
    """What all blocks share: rotary tables, the mask, and where the cache is written."""

    cos: Float32[Array, "b t h"]
    sin: Float32[Array, "b t h"]
    mask: Bool[Array, "b t s"]
    slot: Int32[Array, ""] | None


class Embedding(nn.Module):
    """The table `embedding [V, d]`: rows by token, and the tied output head."""

    vocab_size: int
    features: int

    def setup(self) -> None:
        """Declares the table."""
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features))

    def __call__(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
        """Gathers the rows of `tokens`."""
        return jnp.take(self.embedding, tokens, axis=0)

    def attend(self, x: Float[Array, "b t d"]) -> Float32[Array, "b t v"]:
        """X · tableᵀ, in float32."""
        table = self.embedding.astype(x.dtype)
        contract = (((2,), (1,)), ((), ()))
        return lax.dot_general(x, table, contract, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + ε) · scale over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises `x` over its last axis; the result has the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = lax.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
        return (x32 * inverse * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: LayerCache | None, context: AttentionContext
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attends from `x` to itself, or to the cache after writing `x`'s keys and values."""
        config = self.config
        batch, time, _ = x.shape
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        def project(name: str, num: int) -> Float[Array, "b t n h"]:
            dense = nn.Dense(
                num * head_dim, use_bias=config.qkv_bias, dtype=config.dtype, name=name
            )
            return dense(x).reshape(batch, time, num, head_dim)

        q = project("q_proj", heads)
        k = project("k_proj", kv_heads)
        v = project("v_proj", kv_heads)
        if config.qk_norm:
            q = RMSNorm(config.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, name="k_norm")(k)
        q = apply_rope(q, context.cos, context.sin)
        k = apply_rope(k, context.cos, context.sin)
        keys, values = _merge_heads(k), _merge_heads(v)
        if cache is not None and context.slot is not None:
            start = (0, context.slot, 0)
            keys = lax.dynamic_update_slice(cache.keys, keys.astype(cache.keys.dtype), start)
            values = lax.dynamic_update_slice(
                cache.values, values.astype(cache.values.dtype), start
            )
            cache = LayerCache(keys, values)
        mixed = _attend(q, keys, values, context.mask).astype(config.dtype)
        mixed = mixed.reshape(batch, time, heads * head_dim)
        out = nn.Dense(config.hidden_size, use_bias=False, dtype=config.dtype, name="o_proj")
        return out(mixed), cache


def _merge_heads(x: Float[Array, "b t n h"]) -> Float[Array, "bn t h"]:
    """Moves the heads before the time and merges them with the batch, as the cache has them."""
    batch, time, heads, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, time, head_dim)


def _attend(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "bk s h"],
    values: Float[Array, "bk s h"],
    mask: Bool[Array, "b t s"],
) -> Float32[Array, "b t n h"]:
    """softmax(q·kᵀ/√h)·v with the query heads grouped, so that keys are never repeated."""
    batch, time, heads, head_dim = q.shape
    kv_heads, slots = keys.shape[0] // batch, keys.shape[1]
    # Scaling the queries is cheaper than scaling the scores.
    q = _merge_heads(q * jnp.asarray(head_dim**-0.5, q.dtype)).astype(keys.dtype)
    q = q.reshape(batch * kv_heads, heads // kv_heads * time, head_dim)
    scores = lax.dot_general(
        q, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    scores = jnp.where(
        mask[:, None], scores.reshape(batch, heads, time, slots), jnp.float32(_MASKED)
    )
    weights = jax.nn.softmax(scores, axis=-1).reshape(*q.shape[:2], slots)
    mixed = lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(batch, heads, time, head_dim).swapaxes(1, 2)


class MLP(nn.Module):
    """The gated MLP down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the MLP to every token."""
        config = self.config

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=config.dtype, name=name)

        gate = dense("gate_proj", config.intermediate_size)(x)
        up = dense("up_proj", config.intermediate_size)(x)
        return dense("down_proj", config.hidden_size)(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-normalised transformer block."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: LayerCache | None, context: AttentionContext
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Returns the residual stream after this block, and this block's new cache."""
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="input_layernorm")(x)
        mixed, cache = Attention(self.config, name="self_attn")(normed, cache, context)
        x = x + mixed
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(normed), cache


class UnrolledLayers(nn.Module):
    """The blocks one after another, with parameters `layers/{i}/…`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], caches: Any, context: AttentionContext
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Runs all blocks; `caches` is a tuple of one `LayerCache` per block, or None."""
        block = nn.remat(Block) if self.config.remat else Block
        new = []
        for i in range(self.config.num_layers):
            cache = None if caches is None else caches[i]
            x, cache = block(self.config, name=str(i))(x, cache, context)
            new.append(cache)
        return x, None if caches is None else tuple(new)


def _scanned_layers(config: DecoderConfig) -> nn.Module:
    """The blocks as one scan, with parameters `layers/…` stacked on axis 0."""
    # A scan body is compiled apart from its backward pass, so CSE cannot undo the remat.
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=config.num_layers,
    )
    return scanned(config, name="layers")


class Decoder(nn.Module):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens)` gives logits; with `cache=` it also gives the new
    cache. Every weight matrix is used in one `dot_general`; the embedding table in one gather and,
    if tied, one `dot_general`.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> model = Decoder(config)
    >>> tokens = jnp.zeros((1, 3), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape
    (1, 3, 8)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        *,
        cache: KVCache | None = None,
        mask: Bool[Array, "b t"] | None = None,
        logits_at: Int32[Array, "b m"] | None = None,
        segments: Int32[Array, "b t"] | None = None,
    ) -> Any:
        """Predicts the token after each token.

        Args:
          tokens: int32 `[B, T]`.
          cache: what was read before; the tokens continue it. Its keys and values must have room
            for T more slots.
          mask: bool `[B, T]`, False where `tokens` is padding (on either side). Positions count
            real tokens only, and nothing attends to padding.
          logits_at: int32 `[B, M]`, the indices along T that logits are wanted for; all if None.
          segments: int32 `[B, T]`, the number of the text that each token belongs to where several
            are packed into a row, 0 for padding. Each text starts at position 0 and attends to
            itself only. Instead of `cache` and `mask`.

        Returns:
          float32 logits `[B, T, V]` (or `[B, M, V]`); with a cache, the pair (logits, new cache).

        Raises:
          ValueError: for `segments` together with `cache` or `mask`.
        """
        config = self.config
        if segments is not None and not (cache is None and mask is None):
            raise ValueError("segments cannot be combined with cache or mask; use 0 for padding")
        real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        if cache is None:
            positions = count - 1
        else:
            positions = jnp.max(cache.positions, axis=1, keepdims=True) + count
        stored = jnp.where(real, positions, -1)
        slot = None
        if cache is not None:
            slot = cache.next_slot
            stored = lax.dynamic_update_slice(cache.positions, stored, (0, slot))
        if segments is not None:
            positions = _positions_within(segments)
            stored = jnp.where(segments > 0, positions, -1)
        seen = _attention_mask(positions, stored, config.sliding_window)
        if segments is not None:
            seen &= segments[:, :, None] == segments[:, None, :]
        context = AttentionContext(
            *rope_tables(positions, rope_frequencies(config)), mask=seen, slot=slot
        )

        table = Embedding(config.vocab_size, config.hidden_size, name="embed_tokens")
        x = table(tokens).astype(config.dtype)
        layers = (
            _scanned_layers(config) if config.scan_layers else UnrolledLayers(config, name="layers")
        )
        x, new_layers = layers(x, None if cache is None else cache.layers, context)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        x = RMSNorm(config.rms_norm_eps, name="norm")(x)
        if config.tie_embeddings:
            logits = table.attend(x)
        else:
            head = nn.Dense(config.vocab_size, use_bias=False, dtype=config.dtype, name="lm_head")
            logits = head(x).astype(jnp.float32)
        if cache is None:
            return logits
        return logits, KVCache(new_layers, stored, cache.next_slot + tokens.shape[1])


def _positions_within(segments: Int32[Array, "b t"]) -> Int32[Array, "b t"]:
    """Each token's distance from the first one of its text."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - lax.cummax(jnp.where(first, index, 0), axis=1)


def _attention_mask(
    positions: Int32[Array, "b t"], stored: Int32[Array, "b s"], window: int | None
) -> Bool[Array, "b t s"]:
    """Which stored tokens each token sees: real ones, not later, and within the window."""
    query, key = positions[:, :, None], stored[:, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (query - key < window)
