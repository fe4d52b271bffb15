"""Configuration of the decoder: Llama, Mistral and Mixtral, Qwen2 and 3, Gemma 1 to 3, gpt-oss."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    Attributes:
      kind: `"linear"` divides every frequency by `factor`; `"llama3"` divides low frequencies by
        `factor`, keeps high ones, and interpolates in between; `"yarn"` does so with another ramp
        (arXiv 2309.00071, section 3.2) and scales queries and keys; `"factors"` divides frequency i
        by `factors[i]`.
      factor: the stretch of `"linear"`, `"llama3"` and `"yarn"`.
      low_freq_factor: what turns less often than this in the original context is stretched fully.
      high_freq_factor: what turns more often than this in the original context is kept.
      original_max_position_embeddings: `"llama3"` and `"yarn"`: the context length of pretraining,
        in tokens.
      factors: `"factors"`: one divisor for each of the head_dim / 2 frequencies.
      attention_factor: `"yarn"`: what rotated queries and keys are multiplied by.
      truncate: `"yarn"`: whether the ramp begins and ends at whole frequencies.
    """

    kind: Literal["linear", "llama3", "yarn", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only transformer; the fields follow Hugging Face's names.

    Attributes:
      vocab_size: rows of the embedding table, V.
      hidden_size: width of the residual stream, d.
      intermediate_size: width of the gated MLP, or of each expert's.
      num_layers: number of blocks, L.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head, independent of `hidden_size`.
      max_position_embeddings: the longest context, in tokens.
      rms_norm_eps: added to the mean square in RMS normalisation.
      norm_offset: added to the scale of every norm; 1 in Gemma, whose scales are stored as
        distances from 1.
      post_norms: whether what attention and the MLP give is normalised before it is added to the
        residual stream (Gemma 2 and 3).
      activation: what the gate of the MLP goes through; `"gelu_tanh"` (Gemma) is GELU's
        approximation by tanh, `"gelu_sigmoid"` (gpt-oss) that by x · σ(1.702 x).
      swiglu_limit: the gate is at most this before `activation`, and what it is multiplied by lies
        within ± this, and is added to 1 (gpt-oss).
      scale_embeddings: whether embeddings are multiplied by sqrt(hidden_size), which is rounded to
        `dtype` before (Gemma).
      rope_theta: base of the rotary frequencies.
      rope_scaling: how these are stretched, or None.
      tie_embeddings: whether the output head is the embedding table.
      qkv_bias: whether the q, k and v projections have biases (Qwen2, gpt-oss).
      o_bias: whether the output projection of attention has one (gpt-oss).
      attention_sinks: whether each head has a score that no token gets, which takes part in its
        softmax (gpt-oss; arXiv 2309.17453, section 3.3).
      qk_norm: whether each head's queries and keys are RMS-normalised (Qwen3, Gemma 3).
      query_pre_attn_scalar: attention scores are divided by its square root; `head_dim` if None.
      attn_logit_softcapping: attention scores s become c · tanh(s / c) for this c (Gemma 2).
      final_logit_softcapping: likewise the logits.
      sliding_window: a token attends to itself and the `sliding_window - 1` tokens before it, or
        to all before it if None.
      sliding_layers: for each layer, whether `sliding_window` holds there; in all if None (Gemma 2
        and 3, and gpt-oss alternate).
      sliding_rope_theta: base of the rotary frequencies in layers with the window, where these are
        not stretched; as in the others if None (Gemma 3).
      num_experts: gated MLPs of a block, of which each token takes some (Mixtral, Qwen3-MoE,
        gpt-oss); None for one that all take.
      num_experts_per_tok: how many each token takes; with `num_experts`.
      norm_topk_prob: whether the weights of a token's experts are made to add up to 1.
      expert_bias: whether the router and the experts' matrices have biases (gpt-oss).
      model_type: the family's Hugging Face name; it decides nothing about the computation.
      scan_layers: whether the blocks are one `scan` over parameters stacked on axis 0.
      remat: whether the backward pass recomputes each block's activations.
      dtype: dtype of the activations; norms, softmax and logits are always float32.

    Raises:
      ValueError: if the sizes do not fit each other.

    >>> DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=1, num_heads=2,
    ...               num_kv_heads=1, head_dim=2).num_kv_heads
    1
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: Literal["silu", "gelu_tanh", "gelu_sigmoid"] = "silu"
    swiglu_limit: float | None = None
    scale_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    attention_sinks: bool = False
    qk_norm: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    sliding_rope_theta: float | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool = True
    expert_bias: bool = False
    model_type: str = "llama"
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r} must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be positive or None")
        if self.activation not in (known := ("silu", "gelu_tanh", "gelu_sigmoid")):
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(known)}")
        for field in (
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "swiglu_limit",
        ):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}={value} must be positive or None")
        if self.sliding_layers is not None and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers has {len(self.sliding_layers)} entries; num_layers="
                f"{self.num_layers} needs as many"
            )
        for field in ("sliding_layers", "sliding_rope_theta"):
            if getattr(self, field) is not None and self.sliding_window is None:
                raise ValueError(f"{field} needs a sliding_window")
        experts, taken = self.num_experts, self.num_experts_per_tok
        if (experts is None) != (taken is None):
            raise ValueError("num_experts and num_experts_per_tok need each other")
        if self.expert_bias and experts is None:
            raise ValueError("expert_bias needs num_experts")
        if experts is not None and taken is not None and not 1 <= taken <= experts:
            raise ValueError(f"num_experts_per_tok={taken} must be from 1 to num_experts={experts}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "yarn" and self.head_dim < 4:
            raise ValueError(f"head_dim={self.head_dim} has one frequency; YaRN needs several")
        if (
            scaling is not None
            and scaling.kind == "factors"
            and len(scaling.factors) != self.head_dim // 2
        ):
            raise ValueError(
                f"rope_scaling has {len(scaling.factors)} factors; head_dim={self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is limited to `sliding_window` tokens."""
        if self.sliding_layers is not None:
            return self.sliding_layers
        return (self.sliding_window is not None,) * self.num_layers
