"""A plain Flax decoder: Llama, Mistral, Mixtral, Qwen2 and 3, Gemma 1 to 3, gpt-oss by config."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from lutjax.models.cache import KVCache, LayerCache, Slots, layer_slots
from lutjax.models.config import DecoderConfig
from lutjax.models.mlp import MLP, MixtureOfExperts
from lutjax.models.projections import project
from lutjax.models.rope import apply_rope, rope_frequencies, rope_scale, rope_tables

# Finite, so that a row of padding, which may attend to nothing, gets no NaN.
_MASKED = -1e30

CHUNK = 512
"""How many tokens attend at once, and are read into a cache at once, at most."""


class AttentionContext(NamedTuple):
    """What blocks share: rotary tables, the mask, and where a cache is written."""

    cos: Float32[Array, "b t h"]
    sin: Float32[Array, "b t h"]
    mask: Bool[Array, "b t s"]
    slots: Slots | None


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
    """y = x / sqrt(mean(x²) + ε) · (offset + scale) over the last axis, computed in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises `x` over its last axis; the result has the dtype of `x`."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        if self.offset:
            scale = scale + jnp.float32(self.offset)
        scale = lax.expand_dims(scale, range(x.ndim - 1))
        return (x32 * inverse * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: LayerCache | None, context: AttentionContext
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Attends from `x` to itself and to what the cache holds; `x` is added to the new cache."""
        config = self.config
        batch, time, _ = x.shape
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=config.qkv_bias, dtype=config.dtype, name=name)

        kv_size = kv_heads * head_dim
        sizes = {"q_proj": heads * head_dim, "k_proj": kv_size, "v_proj": kv_size}
        q, k, v = (
            y.reshape(batch, time, -1, head_dim) for y in project(self, "qkv_proj", sizes, dense, x)
        )
        if config.qk_norm:
            q = _norm(config, "q_norm")(q)
            k = _norm(config, "k_norm")(k)
        q = apply_rope(q, context.cos, context.sin)
        k = apply_rope(k, context.cos, context.sin)
        attended = LayerCache(_merge_heads(k), _merge_heads(v))
        if cache is not None and context.slots is not None:
            attended, cache = cache.extend(attended, context.slots)
        sinks = None
        if config.attention_sinks:
            sinks = self.param("sinks", nn.initializers.normal(0.02), (heads,), jnp.float32)
        mixed = _attend(config, q, attended.keys, attended.values, context.mask, sinks)
        mixed = mixed.astype(config.dtype).reshape(batch, time, heads * head_dim)
        out = nn.Dense(
            config.hidden_size, use_bias=config.o_bias, dtype=config.dtype, name="o_proj"
        )
        return out(mixed), cache


def _merge_heads(x: Float[Array, "b t n h"]) -> Float[Array, "bn t h"]:
    """Moves the heads before the time and merges them with the batch, as the cache has them."""
    batch, time, heads, head_dim = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, time, head_dim)


def _attend(
    config: DecoderConfig,
    q: Float[Array, "b t n h"],
    keys: Float[Array, "bk s h"],
    values: Float[Array, "bk s h"],
    mask: Bool[Array, "b t s"],
    sinks: Float[Array, " n"] | None,
) -> Float32[Array, "b t n h"]:
    """Attention of at most CHUNK queries at once, so that there are never T · S scores.

    The backward pass computes the scores of a chunk once more.
    """
    batch, time = q.shape[:2]
    if time <= CHUNK:
        return _attend_at_once(config, q, keys, values, mask, sinks)
    whole = time - time % CHUNK
    chunks = tuple(
        a[:, :whole].reshape(batch, -1, CHUNK, *a.shape[2:]).swapaxes(0, 1) for a in (q, mask)
    )

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(chunk: tuple[Array, Array]) -> Float32[Array, "b c n h"]:
        return _attend_at_once(config, chunk[0], keys, values, chunk[1], sinks)

    mixed = lax.map(attend, chunks).swapaxes(0, 1).reshape(batch, whole, *q.shape[2:])
    if whole == time:
        return mixed
    rest = _attend_at_once(config, q[:, whole:], keys, values, mask[:, whole:], sinks)
    return jnp.concatenate([mixed, rest], axis=1)


def _attend_at_once(
    config: DecoderConfig,
    q: Float[Array, "b t n h"],
    keys: Float[Array, "bk s h"],
    values: Float[Array, "bk s h"],
    mask: Bool[Array, "b t s"],
    sinks: Float[Array, " n"] | None,
) -> Float32[Array, "b t n h"]:
    """softmax(cap(q·kᵀ/√s))·v with the query heads grouped, so that keys are never repeated."""
    batch, time, heads, head_dim = q.shape
    kv_heads, slots = keys.shape[0] // batch, keys.shape[1]
    # Scaling the queries is cheaper than scaling the scores.
    scale = (config.query_pre_attn_scalar or head_dim) ** -0.5
    q = _merge_heads(q * jnp.asarray(scale, q.dtype)).astype(keys.dtype)
    q = q.reshape(batch * kv_heads, heads // kv_heads * time, head_dim)
    scores = lax.dot_general(
        q, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    scores = _softcap(scores, config.attn_logit_softcapping)
    scores = jnp.where(
        mask[:, None], scores.reshape(batch, heads, time, slots), jnp.float32(_MASKED)
    )
    weights = _softmax(scores, sinks).reshape(*q.shape[:2], slots)
    mixed = lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(batch, heads, time, head_dim).swapaxes(1, 2)


def _softmax(
    scores: Float32[Array, "b n t s"], sinks: Float[Array, " n"] | None
) -> Float32[Array, "b n t s"]:
    """Softmax over the last axis, with one more score for each head, whose share is left out."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = sinks.astype(jnp.float32)[None, :, None, None]
    largest = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
    shares = jnp.exp(scores - largest)
    return shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(sink - largest))


def _softcap(x: Float32[Array, "..."], cap: float | None) -> Float32[Array, "..."]:
    """Bounds `x` by ±cap: cap · tanh(x / cap), or `x` itself (arXiv 2408.00118, section 2)."""
    return x if cap is None else jnp.tanh(x / jnp.float32(cap)) * jnp.float32(cap)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.norm_offset, name=name)


class Block(nn.Module):
    """One transformer block: normalised inputs and, with `post_norms`, normalised outputs."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: LayerCache | None, context: AttentionContext
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Returns the residual stream after this block, and this block's new cache."""
        config = self.config
        mlp = (MLP if config.num_experts is None else MixtureOfExperts)(config, name="mlp")
        normed = _norm(config, "input_layernorm")(x)
        mixed, cache = Attention(config, name="self_attn")(normed, cache, context)
        # The names are Hugging Face's: one of them means different norms.
        if config.post_norms:
            x = x + _norm(config, "post_attention_layernorm")(mixed)
            normed = _norm(config, "pre_feedforward_layernorm")(x)
            mixed = mlp(normed)
            return x + _norm(config, "post_feedforward_layernorm")(mixed), cache
        x = x + mixed
        normed = _norm(config, "post_attention_layernorm")(x)
        return x + mlp(normed), cache


class UnrolledLayers(nn.Module):
    """The blocks one after another, with parameters `layers/{i}/…`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], caches: Any, contexts: Mapping[bool, AttentionContext]
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Runs all blocks; `caches` is a tuple of one `LayerCache` per block, or None."""
        block = nn.remat(Block) if self.config.remat else Block
        new = []
        for i, windowed in enumerate(self.config.windowed):
            cache = None if caches is None else caches[i]
            x, cache = block(self.config, name=str(i))(x, cache, contexts[windowed])
            new.append(cache)
        return x, None if caches is None else tuple(new)


def _scanned_block(config: DecoderConfig) -> nn.Module:
    """The block that `_scan_layers` runs."""
    # A scan body is compiled apart from its backward pass, so CSE cannot undo the remat.
    return (nn.remat(Block, prevent_cse=False) if config.remat else Block)(config)


def _scan_layers(
    config: DecoderConfig,
    block: nn.Module,
    x: Float[Array, "b t d"],
    caches: LayerCache | None,
    contexts: Mapping[bool, AttentionContext],
) -> tuple[Float[Array, "b t d"], LayerCache | None]:
    """The blocks as one scan, with parameters `layers/…` stacked on axis 0."""
    alike = len(contexts) == 1

    def step(block: nn.Module, x: Array, layer: Any, contexts: Mapping[bool, Any]) -> Any:
        cache, windowed = layer
        if alike:
            (context,) = contexts.values()
        else:
            choose = functools.partial(jnp.where, windowed)
            context = jax.tree.map(choose, contexts[True], contexts[False])
        return block(x, cache, context)

    scanned = nn.scan(
        step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=config.num_layers,
    )
    layers = (caches, None if alike else jnp.array(config.windowed))
    return scanned(block, x, layers, contexts)


def abstract_params(config: DecoderConfig) -> Any:
    """The shapes and dtypes of a decoder's parameters, as a tree; nothing is allocated.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> abstract_params(config)["norm"]["scale"].shape
    (4,)
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def embed(config: DecoderConfig, rows: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The input of the first block: the tokens' rows of the embedding table, cast and scaled."""
    x = rows.astype(config.dtype)
    if config.scale_embeddings:
        x = x * jnp.asarray(config.hidden_size**0.5, config.dtype)
    return x


def attention_contexts(
    config: DecoderConfig,
    positions: Int32[Array, "b t"],
    new: Int32[Array, "b t"],
    cache: KVCache | None = None,
    segments: Int32[Array, "b t"] | None = None,
) -> dict[bool, AttentionContext]:
    """The context of the layers with a sliding window (True), and of those without (False).

    Args:
      config: the decoder's configuration.
      positions: int32 `[B, T]`, of the tokens.
      new: int32 `[B, T]`, the same, but -1 for padding, which nothing attends to.
      cache: what the tokens continue; they are entered in it (`KVCache.advance`).
      segments: int32 `[B, T]`, which text each token belongs to; instead of `cache`.

    Returns:
      One context for each of the two kinds that the decoder has.
    """
    contexts = {}
    for windowed in sorted(set(config.windowed)):
        stored, slots = new, None
        if cache is not None:
            stored, slots = cache.place(
                positions, new, layer_slots(config, windowed, cache.max_length)
            )
        query, key = positions[:, :, None], stored[:, None, :]
        mask = (key >= 0) & (key <= query)
        if windowed and config.sliding_window is not None:
            mask &= query - key < config.sliding_window
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None, :]
        tables = rope_tables(
            positions,
            rope_frequencies(config, windowed=windowed),
            rope_scale(config, windowed=windowed),
        )
        contexts[windowed] = AttentionContext(*tables, mask=mask, slots=slots)
    return contexts


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

    def setup(self) -> None:
        """Declares the parts."""
        config = self.config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = _scanned_block(config) if config.scan_layers else UnrolledLayers(config)
        self.norm = _norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                dot_general=functools.partial(lax.dot_general, preferred_element_type=jnp.float32),
            )

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
          cache: what was read before; the tokens continue it. It must have T free slots. More than
            `CHUNK` tokens are read in pieces, so that attention needs memory for `CHUNK` · S scores
            a head, not T · S.
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
        if segments is not None and not (cache is None and mask is None):
            raise ValueError("segments cannot be combined with cache or mask; use 0 for padding")
        real = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        if cache is None:
            x, _ = self._read(tokens, real, segments=segments)
        else:
            x, cache = self._read_in_chunks(tokens, real, cache)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[:, :, None], axis=1)
        x = self.norm(x)
        logits = self.embed_tokens.attend(x) if self.config.tie_embeddings else self.lm_head(x)
        logits = _softcap(logits, self.config.final_logit_softcapping)
        return logits if cache is None else (logits, cache)

    def _read_in_chunks(
        self, tokens: Int32[Array, "b t"], real: Bool[Array, "b t"], cache: KVCache
    ) -> tuple[Float[Array, "b t d"], KVCache]:
        """`_read` of at most CHUNK tokens at once, so that activations of all T are not held."""
        batch, time = tokens.shape
        if time <= CHUNK:
            return self._read(tokens, real, cache)
        whole = time - time % CHUNK

        def step(decoder: Decoder, cache: KVCache, chunk: tuple[Array, ...]) -> Any:
            tokens, real = chunk
            x, cache = decoder._read(tokens, real, cache)
            return cache, x

        chunks = tuple(a[:, :whole].reshape(batch, -1, CHUNK) for a in (tokens, real))
        scanned = nn.scan(
            step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            check_constancy_invariants=False,  # the check would trace all layers once more
        )
        cache, x = scanned(self, cache, chunks)
        x = x.reshape(batch, whole, -1)
        if whole < time:
            last, cache = self._read(tokens[:, whole:], real[:, whole:], cache)
            x = jnp.concatenate([x, last], axis=1)
        return x, cache

    def _read(
        self,
        tokens: Int32[Array, "b t"],
        real: Bool[Array, "b t"],
        cache: KVCache | None = None,
        segments: Int32[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The residual stream after the last block, and the new cache if there is one."""
        config = self.config
        if segments is not None:
            positions, real = _positions_within(segments), segments > 0
        else:
            before = jnp.int32(-1) if cache is None else cache.last
            positions = before + jnp.cumsum(real, axis=1, dtype=jnp.int32)
        new = jnp.where(real, positions, -1)
        if cache is not None:
            cache = cache.advance(new)
        contexts = attention_contexts(config, positions, new, cache, segments)

        x = embed(config, self.embed_tokens(tokens))
        caches: Any = None if cache is None else cache.layers
        new_layers: Any
        if config.scan_layers:
            x, new_layers = _scan_layers(config, self.layers, x, caches, contexts)
        else:
            x, new_layers = self.layers(x, caches, contexts)
        return x, None if cache is None else dataclasses.replace(cache, layers=new_layers)


def _positions_within(segments: Int32[Array, "b t"]) -> Int32[Array, "b t"]:
    """Each token's distance from the first one of its text."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - lax.cummax(jnp.where(first, index, 0), axis=1)
