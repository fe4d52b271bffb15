"""Trainable and frozen halves, with grad, optax, TrainState, scan and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lutjax

K, N, RANK, LAYERS = 32, 32, 2, 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def adapter(seed, *batch):
    return lutjax.LowRankArray.of(normal(seed, *batch, K, RANK), normal(seed + 1, *batch, RANK, N))


BASE = lutjax.quantize(normal(0, LAYERS, K, N), bits=4, group_size=16)


def make():
    kernel = lutjax.SumArray.of(BASE, adapter(1, LAYERS))
    return {"kernel": kernel, "bias": jnp.zeros((LAYERS, N)), "step": jnp.int32(3), "name": "x"}


def apply(params, x):
    def layer(x, p):
        return jnp.tanh(x @ p["kernel"] + jnp.broadcast_to(p["bias"], x.shape)), None

    stacked = {"kernel": params["kernel"], "bias": params["bias"]}
    return jax.lax.scan(layer, x, stacked)[0]


lifted = lutjax.lift(apply, strict=True)


def test_halves_and_their_union():
    params = make()
    learns, frozen = lutjax.partition(params)
    assert [a.shape for a in jax.tree.leaves(learns)] == [
        (LAYERS, N), (LAYERS, K, RANK), (LAYERS, RANK, N),
    ]  # fmt: skip
    assert learns["kernel"].parts[0].words is None and frozen["bias"] is None
    both = lutjax.combine(learns, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (both, params)), strict=True))


def test_a_predicate_chooses_by_path():
    learns, _ = lutjax.partition(make(), lambda path, leaf: path == "kernel/parts/0/scales")
    assert [a.shape for a in jax.tree.leaves(learns)] == [(LAYERS, K // 16, N)]
    assert lutjax.partition(BASE)[0] == lutjax.partition(BASE, lambda *_: False)[0]
    with pytest.raises(TypeError, match="'kernel/parts/0/words' cannot be trained: it is uint8"):
        lutjax.partition(make(), lambda path, leaf: "kernel" in path)
    with pytest.raises(TypeError, match="'name' cannot be trained: it is str"):
        lutjax.partition(make(), lambda path, leaf: path == "name")


def test_gradients_equal_the_dense_ones():
    learns, frozen = lutjax.partition(make())
    x = normal(5, 4, K)

    def loss(learns, fn):
        params = lutjax.combine(learns, frozen)
        # Dense: the low-rank factors must stay visible to the gradient.
        return jnp.sum(fn(params if fn is lifted else lutjax.materialize(params), x) ** 2)

    def scales(learns):
        return jax.grad(loss)(learns, lifted), jax.grad(loss)(learns, apply)

    actual, expected = jax.jit(scales)(learns)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=5e-5 * float(jnp.abs(e).max()))


def test_train_state_and_optax():
    params = {name: leaf for name, leaf in make().items() if name != "name"}  # jit takes arrays
    learns, frozen = lutjax.partition(params)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        state = TrainState.create(apply_fn=lifted, params=learns, tx=optax.adamw(1e-2))
        # Two moments of what learns, and nothing for the codes.
        moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
        assert sum(a.size for a in moments) == 2 * sum(a.size for a in jax.tree.leaves(learns))
        x, target = normal(5, 4, K), jnp.zeros((4, N))

        @jax.jit
        def step(state, frozen):
            def loss(learns):
                params = lutjax.combine(learns, frozen)
                return jnp.mean((state.apply_fn(params, x) - target) ** 2)

            value, gradients = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradients), value

        losses = []
        for _ in range(5):
            state, value = step(state, frozen)
            losses.append(float(value))
    assert losses[-1] < losses[0]


def test_many_adapters_share_one_base():
    count, x = 5, normal(5, 4, K)
    frozen = lutjax.partition({"kernel": lutjax.SumArray.of(BASE, adapter(1, LAYERS))})[1]
    adapters = [
        lutjax.partition({"kernel": lutjax.SumArray.of(BASE, adapter(10 * i, LAYERS))})[0]
        for i in range(count)
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *adapters)

    def fn(learns, frozen, x):
        params = lutjax.combine(learns, frozen) | {"bias": jnp.zeros((LAYERS, N))}
        return lifted(params, x)

    many = jax.vmap(fn, in_axes=(0, None, None))
    out = jax.jit(many)(stacked, frozen, x)
    for i in range(count):
        np.testing.assert_allclose(out[i], fn(adapters[i], frozen, x), rtol=1e-4, atol=1e-5)
    # The codes appear stacked by layers, as given, but never by adapters.
    program = str(jax.make_jaxpr(many)(stacked, frozen, x))
    blocks = f"{K // 8},4,{N}]"
    assert f"u8[{LAYERS},{blocks}" in program
    assert f"u8[{count},{blocks}" not in program and f"u8[{count},{LAYERS}," not in program
    assert f"u8[{LAYERS},{count}," not in program
    # Nor is the dense weight made for each of them.
    assert f"f32[{count},{K},{N}]" not in program
