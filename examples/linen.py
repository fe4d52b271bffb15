"""Compressed weights in Flax Linen models: the model code does not change.

Run it: ``python examples/linen.py``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import lutjax


class Block(nn.Module):
    """Attention with DenseGeneral kernels of three axes, and an MLP."""

    heads: int
    width: int

    @nn.compact
    def __call__(self, x, _):
        """One residual block; the second value is what ``nn.scan`` would stack."""
        attention = nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")
        x = x + attention(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.DenseGeneral((2, self.width), name="up")(nn.LayerNorm()(x)))
        return x + nn.DenseGeneral(self.width, axis=(-2, -1), name="down")(hidden), None


class Model(nn.Module):
    """Embedding, scanned and rematerialised blocks, tied output head."""

    vocab: int = 96
    width: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        """Logits of the tokens."""
        embed = nn.Embed(self.vocab, self.width, name="embed")
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = blocks(4, self.width, name="blocks")(embed(tokens), None)
        return embed.attend(nn.Dense(self.width, name="head")(x))


CONFIG = lutjax.LutConfig(bits=4, group_size=32)
RECIPE = lutjax.Recipe(
    (
        # To heads [D, H, d] the first axis is summed over, from heads [H, d, D] the first two. Axes
        # are counted from the end, so that stacked layers may come before them.
        lutjax.Rule("*/attention/out/kernel", CONFIG, axis=(-3, -2)),
        lutjax.Rule("*/attention/*/kernel", CONFIG, axis=-3),
        lutjax.Rule("*/up/kernel", CONFIG, axis=-3),
        lutjax.Rule("*/down/kernel", CONFIG, axis=(-3, -2)),
        lutjax.Rule("embed/embedding", CONFIG),
        lutjax.Rule("*", CONFIG),
    )
)


def main():
    """Compresses the model, runs it, and compares with the dense weights."""
    model, tokens = Model(), jnp.arange(12).reshape(2, 6)
    params = model.init(jax.random.key(0), tokens)["params"]
    compressed = lutjax.quantize(params, RECIPE)
    print(lutjax.summarize(compressed))

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    print(lutjax.lift.report(apply, compressed, tokens))
    logits = jax.jit(lutjax.lift(apply, strict=True))(compressed, tokens)
    return apply, compressed, (tokens,), logits


if __name__ == "__main__":
    main()
