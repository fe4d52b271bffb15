"""Compressed weights in Equinox models: the module itself is the pytree of parameters.

Equinox stores weights as ``[out, in]`` and computes ``W @ x``; leaves called ``weight`` are grouped
along their last axis by default. Run it: ``python examples/equinox_model.py``.
"""

import equinox as eqx
import jax

import lutjax


class Model(eqx.Module):
    """Attention and an MLP on one sequence."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, width: int = 64, *, key):
        first, second = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(4, width, inference=True, key=first)
        self.mlp = eqx.nn.MLP(width, width, 2 * width, depth=2, key=second)

    def __call__(self, x):
        """The sequence ``[time, width]`` transformed."""
        x = x + self.attention(x, x, x)
        return x + jax.vmap(self.mlp)(x)


def main():
    """Compresses the model, runs it, and compares with the dense weights."""
    model = Model(key=jax.random.key(0))
    compressed = lutjax.quantize(model, bits=4, group_size=32)
    batch = jax.random.normal(jax.random.key(1), (2, 6, 64))

    def apply(model, batch):
        return jax.vmap(model)(batch)

    # The module holds functions too, so jit the call, not the module's leaves.
    print(lutjax.lift.report(apply, compressed, batch))
    arrays, static = eqx.partition(compressed, eqx.is_array)

    @jax.jit
    def run(arrays, batch):
        return lutjax.lift(apply, strict=True)(eqx.combine(arrays, static), batch)

    return apply, compressed, (batch,), run(arrays, batch)


if __name__ == "__main__":
    main()
