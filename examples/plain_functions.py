"""Compressed weights in plain functions of nested dictionaries, as Haiku's ``apply`` is one.

Trains a low-rank adapter on a frozen, compressed base. Run it:
``python examples/plain_functions.py``.
"""

import jax
import jax.numpy as jnp
import optax

import lutjax


def linear(params, x):
    """Haiku's ``Linear``: ``w`` of shape ``[in, out]`` and ``b``."""
    return x @ params["w"] + jnp.broadcast_to(params["b"], (*x.shape[:-1], params["b"].size))


def apply(params, x):
    """A residual MLP, its modules named as Haiku names them."""
    hidden = jax.nn.silu(linear(params["mlp/~/linear_0"], x))
    return x + linear(params["mlp/~/linear_1"], hidden)


def init(key, width=64):
    """Dense parameters."""
    first, second = jax.random.split(key)
    scale = width**-0.5
    return {
        "mlp/~/linear_0": {
            "w": scale * jax.random.normal(first, (width, 2 * width)),
            "b": jnp.zeros(2 * width),
        },
        "mlp/~/linear_1": {
            "w": scale * jax.random.normal(second, (2 * width, width)),
            "b": jnp.zeros(width),
        },
    }


def add_adapters(params, rank, key):
    """Puts a low-rank array beside every compressed one; its product is zero at first."""

    def add(leaf):
        if not lutjax.is_compressed(leaf):
            return leaf
        rows, columns = leaf.shape
        left = rows**-0.5 * jax.random.normal(key, (rows, rank))
        return lutjax.SumArray.of(leaf, lutjax.LowRankArray.of(left, jnp.zeros((rank, columns))))

    return jax.tree.map(add, params, is_leaf=lutjax.is_compressed)


def main():
    """Compresses, runs, and trains the adapters."""
    compressed = lutjax.quantize(init(jax.random.key(0)), bits=4, group_size=32)
    x = jax.random.normal(jax.random.key(1), (8, 64))
    output = jax.jit(lutjax.lift(apply, strict=True))(compressed, x)

    target = jnp.roll(x, 1, axis=1)
    trainable, frozen = lutjax.partition(add_adapters(compressed, 4, jax.random.key(2)))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state, frozen):
        def loss(trainable):
            params = lutjax.combine(trainable, frozen)
            return jnp.mean((lutjax.lift(apply, strict=True)(params, x) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(20):
        trainable, state, value = step(trainable, state, frozen)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.7 * losses[0]
    return apply, compressed, (x,), output


if __name__ == "__main__":
    main()
