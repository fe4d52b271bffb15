"""The second half of a block: a gated MLP, or one of several for each token."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from lutjax.models.config import DecoderConfig
from lutjax.models.projections import project

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(x * jnp.asarray(1.702, x.dtype)),
}


def _gated(config: DecoderConfig, gate: Float[Array, "... f"], up: Float[Array, "... f"]) -> Array:
    """What the last matrix of an MLP is multiplied with: activation(gate) · up, or as limited."""
    if config.swiglu_limit is not None:
        limit = jnp.asarray(config.swiglu_limit, gate.dtype)
        gate = jnp.minimum(gate, limit)
        up = jnp.clip(up, -limit, limit) + jnp.ones((), up.dtype)
    return _ACTIVATIONS[config.activation](gate) * up


class MLP(nn.Module):
    """The gated MLP down(activation(gate(x)) · up(x)) (arXiv 2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the MLP to every token."""
        config = self.config

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=config.dtype, name=name)

        sizes = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        gate, up = project(self, "gate_up_proj", sizes, dense, x)
        return dense("down_proj", config.hidden_size)(_gated(config, gate, up))


class MixtureOfExperts(nn.Module):
    """Of `num_experts` gated MLPs, each token's best (arXiv 2401.04088, section 2.1).

    y = Σᵢ pᵢ · MLPᵢ(x) over the `num_experts_per_tok` experts of the largest pᵢ, which are divided
    by their sum if `norm_topk_prob`; p = softmax(router(x)).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies its experts to every token."""
        config = self.config
        assert config.num_experts is not None and config.num_experts_per_tok is not None
        tokens = x.reshape(-1, x.shape[-1])
        router = nn.Dense(
            config.num_experts, use_bias=config.expert_bias, dtype=config.dtype, name="router"
        )
        chances = jax.nn.softmax(router(tokens).astype(jnp.float32))
        shares, chosen = lax.top_k(chances, config.num_experts_per_tok)
        if config.norm_topk_prob:
            shares = shares / shares.sum(axis=-1, keepdims=True)

        # Every token once for each of its experts, sorted by expert.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        rows = jnp.take(tokens, order // config.num_experts_per_tok, axis=0)
        sizes = jnp.bincount(chosen.reshape(-1), length=config.num_experts)
        rows = Experts(config, name="experts")(rows, sizes.astype(jnp.int32))
        rows = jnp.take(rows, jnp.argsort(order), axis=0).reshape(*chosen.shape, -1)
        return (rows * shares[..., None].astype(x.dtype)).sum(axis=1).reshape(x.shape)


class Experts(nn.Module):
    """The gated MLPs of a mixture."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "m d"], sizes: Int32[Array, " e"]) -> Float[Array, "m d"]:
        """Applies each expert to its rows: `sizes[0]` of the first, then those of the next."""
        config = self.config

        def stacked(name: str, features: int) -> _Stacked:
            return _Stacked(config, features, name=name)

        columns = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        gate, up = project(self, "gate_up_proj", columns, stacked, x, sizes)
        return stacked("down_proj", config.hidden_size)(_gated(config, gate, up), sizes)


class _Stacked(nn.Module):
    """One of the matrices of every expert, `kernel [E, in, out]`, and perhaps `bias [E, out]`."""

    config: DecoderConfig
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "m k"], sizes: Int32[Array, " e"]) -> Float[Array, "m n"]:
        """The rows of each expert, in order, times its matrix."""
        config, (rows, width) = self.config, x.shape
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("kernel", init, (config.num_experts, width, self.features))
        y = lax.ragged_dot(x.astype(config.dtype), kernel.astype(config.dtype), sizes)
        if not config.expert_bias:
            return y
        shape = (config.num_experts, self.features)
        bias = self.param("bias", nn.initializers.zeros_init(), shape).astype(config.dtype)
        return y + jnp.repeat(bias, sizes, axis=0, total_repeat_length=rows)
