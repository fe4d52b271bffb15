"""Gated weights by columns and by rows on eight virtual devices; a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax.arrays import DenseArray, GatedArray

WIDTH, HIDDEN = 64, 128
SPECS = {"up": P(None, "model"), "down": P("model", None)}  # by columns, then by rows
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params(kinds):
    """A gated MLP with a norm for every row: the first weight, then the second, dense or codes."""

    def gated(weight, kind, threshold):
        inner = DenseArray.of(weight)
        if kind == "4-bit":
            inner = lutjax.quantize(weight, bits=4, group_size=16)
        return GatedArray.of(inner, threshold, jnp.linalg.norm(inner.materialize(), axis=1))

    return {
        "up": gated(normal(0, WIDTH, HIDDEN) / WIDTH**0.5, kinds[0], 0.8),
        "down": gated(normal(1, HIDDEN, WIDTH) / HIDDEN**0.5, kinds[1], 0.3),
    }


def mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params, x):
    return jnp.sum(lutjax.lift(mlp, strict=True)(params, x) ** 2)


def partial_mlp(params, x):
    """What each device computes of the MLP with its shards."""
    return jax.lax.psum(lutjax.lift(mlp, strict=True)(params, x), "model")


def check(kinds):
    """One token: sharded automatically and by hand, values and gradients, against one device."""
    params, x = make_params(kinds), normal(2, 1, WIDTH)
    value_and_grad = jax.value_and_grad(loss, argnums=1)
    expected = jax.jit(value_and_grad)(params, x)
    assert 0.2 < float(jnp.mean(params["up"].ignored(x))) < 0.8
    assert float(jnp.mean(expected[1] == 0)) > 0.2

    shardings = lutjax.shardings_like(params, {k: NamedSharding(MESH, s) for k, s in SPECS.items()})
    sharded = jax.device_put(params, shardings)
    placed = jax.device_put(x, NamedSharding(MESH, P(None, None)))
    program = jax.jit(value_and_grad).lower(sharded, placed).compile()
    compare(program(sharded, placed), expected)
    # each device keeps its part of the weights: no array of a whole one exists anywhere
    whole = (f"[{WIDTH},{HIDDEN}]", f"[{HIDDEN},{WIDTH}]", "u8[")
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    assert not [line for line in gathered if any(shape in line for shape in whole)], gathered

    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    mapped = jax.shard_map(partial_mlp, mesh=MESH, in_specs=(specs, P()), out_specs=P())
    manual = jax.jit(jax.value_and_grad(lambda x: jnp.sum(mapped(sharded, x) ** 2)))
    compare(manual(x), expected)


def compare(actual, expected):
    # float32, another order of sums
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4)


if __name__ == "__main__":
    check(("dense", "4-bit"))
    check(("4-bit", "dense"))
    print("PASSED")
