"""Compressed weights in Flax NNX models: split, compress the state, merge inside lift.

Run it: ``python examples/nnx.py``.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import lutjax


class Model(nnx.Module):
    """An embedding, attention, and an MLP."""

    def __init__(self, width: int = 64, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(96, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, tokens):
        """Logits of the tokens."""
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.embed.attend(x)


CONFIG = lutjax.LutConfig(bits=4, group_size=32)
RECIPE = lutjax.Recipe(
    (
        lutjax.Rule("attention/out/kernel", CONFIG, axis=(-3, -2)),
        lutjax.Rule("attention/*/kernel", CONFIG, axis=-3),
        lutjax.Rule("embed/embedding", CONFIG),
        lutjax.Rule("*", CONFIG),
    )
)


def main():
    """Compresses the model, runs it, and compares with the dense weights."""
    graph, state = nnx.split(Model(rngs=nnx.Rngs(0)))
    compressed = lutjax.quantize(nnx.to_pure_dict(state), RECIPE)
    tokens = jnp.arange(12).reshape(2, 6)

    def apply(params, tokens):
        replaced = nnx.clone(state)
        nnx.replace_by_pure_dict(replaced, params)
        return nnx.merge(graph, replaced)(tokens)

    print(lutjax.lift.report(apply, compressed, tokens))
    logits = jax.jit(lutjax.lift(apply, strict=True))(compressed, tokens)
    return apply, compressed, (tokens,), logits


if __name__ == "__main__":
    main()
