"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in the half-rotation layout."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from lutjax.models.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, *, windowed: bool = False) -> np.ndarray:
    """The rotary frequencies θ^(−2i/head_dim), divided as `config.rope_scaling` says.

    What `config.rope_scaling` says of the size of queries and keys is `rope_scale`.

    Args:
      config: the decoder's configuration.
      windowed: whether they are those of the layers with a sliding window.

    Returns:
      float32 `[head_dim / 2]`, in radians per token.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=8, num_layers=1,
    ...                        num_heads=1, num_kv_heads=1, head_dim=4, rope_theta=100.0)
    >>> rope_frequencies(config).tolist()
    [1.0, 0.10000000149011612]
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    theta, scaling = _base(config, windowed)
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = frequencies / _divisors(frequencies, scaling)
    return frequencies.astype(np.float32)


def rope_scale(config: DecoderConfig, *, windowed: bool = False) -> float:
    """What rotated queries and keys are multiplied by; see `rope_frequencies`."""
    _, scaling = _base(config, windowed)
    return 1.0 if scaling is None else scaling.attention_factor


def _base(config: DecoderConfig, windowed: bool) -> tuple[float, RopeScaling | None]:
    if windowed and config.sliding_rope_theta is not None:
        return config.sliding_rope_theta, None
    return config.rope_theta, config.rope_scaling


def _divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":
        return np.full_like(frequencies, scaling.factor)
    if scaling.kind == "factors":
        return np.asarray(scaling.factors, np.float64)
    # How often each rotates within the original context, from the fastest to the slowest.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (_kept_by_yarn if scaling.kind == "yarn" else _kept_by_llama3)(turns, scaling)
    return 1.0 / ((1.0 - kept) / scaling.factor + kept)


def _kept_by_llama3(turns: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """A ramp from 0 to 1, linear in the turns (Llama 3.1)."""
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)


def _kept_by_yarn(turns: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """A ramp from 1 to 0, linear in the index of the frequency: in the logarithm of the turns."""
    index = np.arange(turns.size)
    step = math.log(turns[0] / turns[1])
    begin = math.log(turns[0] / scaling.high_freq_factor) / step
    end = math.log(turns[0] / scaling.low_freq_factor) / step
    if scaling.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    # The last index is that of an angle of x, of which there are two for each frequency.
    begin, end = max(begin, 0), min(end, 2 * turns.size - 1)
    return 1.0 - np.clip((index - begin) / max(end - begin, 1e-3), 0.0, 1.0)


def rope_tables(
    positions: Int[Array, "b t"], frequencies: np.ndarray, scale: float = 1.0
) -> tuple[Float32[Array, "b t h"], Float32[Array, "b t h"]]:
    """Cosines and sines of positions × frequencies, times `scale`.

    Args:
      positions: `[B, T]`, in tokens.
      frequencies: float32 `[head_dim / 2]`.
      scale: what queries and keys are multiplied by.

    Returns:
      Two float32 arrays `[B, T, head_dim / 2]`.
    """
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1.0 else (cos * jnp.float32(scale), sin * jnp.float32(scale))


def apply_rope(
    x: Float[Array, "b t n h2"], cos: Float32[Array, "b t h"], sin: Float32[Array, "b t h"]
) -> Float[Array, "b t n h2"]:
    """Rotates each pair (x[i], x[i + head_dim/2]) by its angle.

    Args:
      x: queries or keys `[B, T, heads, head_dim]`.
      cos: float32 `[B, T, head_dim / 2]`.
      sin: float32 `[B, T, head_dim / 2]`.

    Returns:
      The rotated array, in the dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
