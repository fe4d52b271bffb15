"""Adapters as weights: products, gradients, what is trained, memory of the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax import linear_maps as lm
from lutjax.adapters import (
    AdapterArray,
    dual,
    kronecker,
    lora,
    merge,
    one_sided,
    trainable,
    two_sided,
    with_trainable,
)
from lutjax.optim import project

MAPS = {
    "gaussian": lm.Gaussian(3),
    "right": lm.SemiOrthogonal(3, side="right"),
    "kronecker": lm.Kronecker(lm.Gaussian(2, side="left"), lm.Gaussian(3, side="right")),
    "krona": lm.KronA((2, 4)),
    "principal": lm.PrincipalWeights(2, 1),
}


def randomised(adapted, seed=0):
    """The same adapters with latents that are not zero."""
    rng = np.random.default_rng(seed)
    values = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), trainable(adapted)
    )
    return with_trainable(adapted, values)


@pytest.mark.parametrize("name", MAPS)
def test_products_and_gradients_are_those_of_the_dense_weight(name):
    base = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8)), jnp.float32)
    adapted = randomised(one_sided({"w": base}, MAPS[name], jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)), jnp.float32)

    def f(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    @jax.jit
    def values(adapted):
        def lifted(t):
            return jnp.sum(lutjax.lift(f, strict=True)(with_trainable(adapted, t), x) ** 2)

        def dense(t):
            return jnp.sum(f(merge(with_trainable(adapted, t)), x) ** 2)

        t = trainable(adapted)
        return jax.value_and_grad(lifted)(t), jax.value_and_grad(dense)(t)

    lifted, dense = values(adapted)
    # float32; thin products sum in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3), lifted, dense)
    assert adapted["w"].shape == (6, 8)
    np.testing.assert_allclose(
        merge(adapted)["w"], base + adapted["w"].map.up(adapted["w"].latent), rtol=1e-6
    )


def test_compressed_bases_stay_compressed():
    base = lutjax.quantize(jnp.asarray(np.random.default_rng(1).normal(size=(64, 32))), bits=4)
    adapted = randomised(one_sided({"w": base}, lm.Gaussian(3), jax.random.key(0)))
    x = jnp.ones((2, 64))
    actual = jax.jit(lutjax.lift(lambda p, x: x @ p["w"], strict=True))(adapted, x)
    expected = x @ merge(adapted)["w"].astype(x.dtype)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert adapted["w"].base is base
    assert "base=LutArray" in repr(adapted["w"])


def test_stacked_weights_have_an_adapter_for_each_layer():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)}
    adapted = randomised(one_sided(params, lm.Gaussian(2), jax.random.key(0)))

    def f(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.ones((2, 4))
    actual = jax.jit(lutjax.lift(f, strict=True))(adapted, x)
    np.testing.assert_allclose(actual, jax.jit(f)(merge(adapted), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_axis", [(1, 2), (2, 1)])
def test_nd_weights_by_dimension_numbers(output_axis):
    params = {"heads": jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 4)), jnp.float32)}
    numbers = {"heads": lm.DimensionNumbers(0, output_axis)}
    adapted = randomised(
        one_sided(params, lm.Gaussian(2), jax.random.key(0), weight_dimension_numbers=numbers)
    )
    assert adapted["heads"].shape == (6, 2, 4)

    def f(params, x):
        return jnp.einsum("bd,dnh->bnh", x, params["heads"])

    x = jnp.ones((3, 6))
    actual = jax.jit(lutjax.lift(f, strict=True))(adapted, x)
    np.testing.assert_allclose(actual, f(merge(adapted), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, (2, 1)), ((1, 0), 2)], ids=str)
def test_the_order_of_axes_is_that_of_the_map(axes):
    weight = jax.random.normal(jax.random.key(0), (6, 2, 4))
    bound = lm.Gaussian(2).init(
        jax.random.key(1), weight.shape, dimension_numbers=lm.DimensionNumbers(*axes)
    )
    latent = bound.down(weight)
    adapter = AdapterArray.of(jnp.zeros_like(weight), bound, latent)
    np.testing.assert_array_equal(adapter.materialize(), bound.up(latent))


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda p, k: two_sided(p, 2, k), {"factor": (6, 2), "latent": (2, 8)}),
        (lambda p, k: kronecker(p, (2, 4), k), {"factor": (2, 4), "latent": (3, 2)}),
        (lambda p, k: one_sided(p, lm.Gaussian(2), k), (2, 8)),
    ],
    ids=["two_sided", "kronecker", "one_sided"],
)
def test_adapters_start_at_the_base_and_train(make, shapes):
    params = {"w": jnp.ones((6, 8)), "b": jnp.zeros(8)}
    adapted = make(params, jax.random.key(0))
    np.testing.assert_array_equal(merge(adapted)["w"], params["w"])
    picked = trainable(adapted)
    assert picked["b"] is None
    assert jax.tree.map(jnp.shape, picked["w"]) == shapes
    assert trainable(adapted, others=True)["b"] is params["b"]

    target = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
    optimizer = optax.adam(0.05)

    @jax.jit
    def fit(t):
        def loss(t):
            return jnp.mean((merge(with_trainable(adapted, t))["w"] - target) ** 2)

        def body(_, carry):
            t, state = carry
            updates, state = optimizer.update(jax.grad(loss)(t), state, t)
            return optax.apply_updates(t, updates), state

        after, _ = jax.lax.fori_loop(0, 100, body, (t, optimizer.init(t)))
        return loss(t), loss(after)

    before, after = fit(picked)
    assert after < 0.95 * before


def test_the_backward_pass_never_forms_a_whole_gradient():
    # Two layers of K x K, rank 4, batch 8: a gradient of a weight would be 1 MB.
    jax.config.update("jax_disable_most_optimizations", False)
    k = 512
    weight = k * k * 4
    params = {"up": jnp.ones((k, k)), "down": jnp.ones((k, k))}
    optimizer = project(optax.adam(1e-3), lm.Gaussian(4), refresh_every=None)
    training = dual(optimizer)
    x = jnp.ones((8, k))

    def f(params, x):
        return jnp.mean(jnp.tanh(x @ params["up"]) @ params["down"])

    def adapter_step(state, x):
        def loss(latents):
            return lutjax.lift(f, strict=True)(training.adapted(state, latents), x)

        return training.update(jax.grad(loss)(state.latents), state)

    def weight_step(params, state, x):
        return optimizer.update(jax.grad(f)(params, x), state, params)[1]

    def temporary(function, *args):
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    state = jax.eval_shape(training.init, params)
    adapter = temporary(adapter_step, state, x)
    whole = temporary(weight_step, params, jax.eval_shape(optimizer.init, params), x)
    assert adapter < weight / 4
    assert whole >= weight

    def whole_gradients(function, *args):
        """Products in the traced program whose result has the shape of a weight."""
        lines = jax.jit(function).lower(*args).as_text().splitlines()
        return [x for x in lines if "dot_general" in x and f"-> tensor<{k}x{k}xf32>" in x]

    assert not whole_gradients(adapter_step, state, x)
    assert whole_gradients(weight_step, params, jax.eval_shape(optimizer.init, params), x)


@pytest.mark.parametrize("compressed", [False, True])
def test_maps_of_weights_start_from_them(compressed):
    weight = jnp.ones((32, 32)).at[3, 5].set(50.0)
    if compressed:
        weight = lutjax.quantize(weight, bits=8, group_size=32)
    map_ = lm.PrincipalWeights(rank=1, budget_rank=1)
    adapter = one_sided({"w": weight}, map_, jax.random.key(0))["w"]
    assert 3 * 32 + 5 in np.asarray(adapter.map.indices).ravel()


def test_a_base_with_another_view_is_refused():
    base = lutjax.quantize(jnp.ones((64, 32)), bits=4).T
    bound = lm.Gaussian(2).init(jax.random.key(0), (32, 64))
    with pytest.raises(ValueError, match="the map is for the view"):
        AdapterArray.of(base, bound)


def test_errors_name_the_parameter():
    with pytest.raises(ValueError, match="'block/w': rank=5"):
        one_sided({"block": {"w": jnp.ones((4, 4))}}, lm.Gaussian(5), jax.random.key(0))
    with pytest.raises(ValueError, match="2 adapters, but 1 weights"):
        lora.stack({}, {}, weights=(1,))


@pytest.mark.parametrize(
    "make", [lambda p, k: two_sided(p, 2, k), lambda p, k: kronecker(p, (2, 4), k)]
)
def test_factors_of_narrow_weights_are_float32(make):
    params = {"w": jnp.ones((6, 8), jnp.bfloat16)}
    adapted = make(params, jax.random.key(0))
    assert adapted["w"].dtype == jnp.bfloat16
    dtypes = jax.tree.map(lambda a: a.dtype.name, trainable(adapted)["w"])
    assert dtypes == {"factor": "float32", "latent": "float32"}
    x = jnp.ones((3, 6), jnp.bfloat16)
    y = lutjax.lift(lambda p, x: x @ p["w"], strict=True)(adapted, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x @ params["w"])


def test_factors_of_wide_weights_are_as_wide():
    with jax.enable_x64(True):
        adapted = two_sided({"w": jnp.ones((6, 8), jnp.float64)}, 2, jax.random.key(0))
        assert trainable(adapted)["w"]["factor"].dtype == jnp.float64


def test_both_kinds_of_adapters_are_merged_by_one_function_and_told_apart():
    params = {"w": lutjax.quantize(jnp.eye(32), bits=4, group_size=32)}
    low_rank = lora.attach(params, lora.init(params, 2, jax.random.key(0), targets=("w",)))
    mapped = two_sided(params, 2, jax.random.key(0))
    for adapted in (low_rank, mapped):
        np.testing.assert_array_equal(merge(adapted)["w"], params["w"].materialize())
    assert lora.merge is merge
    with pytest.raises(ValueError, match=r"no adapter to train; those of lora\.attach"):
        trainable(low_rank)


@pytest.mark.parametrize("name", MAPS)
def test_adapters_of_one_sided_maps_are_low_rank(name):
    base = {"w": lutjax.quantize(jnp.eye(32, 48), bits=4, group_size=32), "b": jnp.zeros(3)}
    only_w = {"w": lm.DimensionNumbers(), "b": None}
    adapted = randomised(
        one_sided(base, MAPS[name], jax.random.key(0), weight_dimension_numbers=only_w)
    )
    if name not in ("gaussian", "right"):
        with pytest.raises(TypeError, match="'w' has an adapter that is no low-rank part; merge"):
            lora.detach(adapted)
        return
    left, adapter = lora.detach(adapted)
    assert left["w"] is base["w"] and left["b"] is base["b"]
    merged = [merge(tree)["w"] for tree in (adapted, lora.attach(left, adapter))]
    np.testing.assert_allclose(*merged, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lookups_need_only_the_rows_that_are_asked_for(side):
    table = lutjax.quantize(jax.random.normal(jax.random.key(0), (64, 32)), bits=4, group_size=32)
    adapted = randomised(one_sided({"w": table}, lm.Gaussian(3, side=side), jax.random.key(1)))
    tokens = jnp.array([3, 63, 3])

    def look_up(params):
        return params["w"][tokens], params["w"][:, 5]

    found = lutjax.lift(look_up, strict=True)(adapted)
    for rows, expected in zip(found, look_up(merge(adapted)), strict=True):
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_adapters_are_split_as_their_weight_is(side):
    mesh = jax.make_mesh((1, 1), ("k", "n"), axis_types=(AxisType.Auto,) * 2)
    sharding = {"w": NamedSharding(mesh, P("k", "n"))}
    base = {"w": lutjax.quantize(jnp.eye(64, 32), bits=4, group_size=32)}

    def specs(map_):
        adapted = one_sided(base, map_, jax.random.key(0))
        found = jax.tree.map(lambda s: s.spec, lutjax.shardings_like(adapted, sharding))["w"]
        plain = lutjax.shardings_like(base, sharding)["w"]
        assert found.base.words == plain.words.spec == P("k", None, "n")
        return found

    projected = specs(lm.SVD(2, side=side))
    factors = [projected.map.basis, projected.latent]
    assert factors == (
        [P("k", None), P(None, "n")] if side == "left" else [P("n", None), P("k", None)]
    )
    # A factor that is drawn from a key is drawn as a whole.
    assert specs(lm.Gaussian(2, side=side)).latent == P(None, None)


def test_latents_of_narrow_weights_are_float32():
    narrow = {"w": jnp.ones((6, 8), jnp.bfloat16)}
    assert one_sided(narrow, lm.Gaussian(2), jax.random.key(0))["w"].latent.dtype == jnp.float32
    asked = one_sided(narrow, lm.Gaussian(2), jax.random.key(0), dtype=jnp.bfloat16)
    assert trainable(asked)["w"].dtype == jnp.bfloat16
