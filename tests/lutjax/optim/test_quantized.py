"""Quantised optimiser state: tables, storage, and training as with full precision."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lutjax
from lutjax import LutArray, is_compressed
from lutjax.adapters import lora
from lutjax.linear_maps import Gaussian
from lutjax.optim import flora, galore, project, quantized_state
from lutjax.optim.quantized import dynamic_map, moment_table
from lutjax.paths import path_string


def test_dynamic_maps_have_their_published_shape():
    signed, unsigned = dynamic_map(8, signed=True), dynamic_map(8, signed=False)
    for table in (signed, unsigned):
        assert table.shape == (256,) and len(np.unique(table)) == 256
        assert table.max() == 1.0 and 0.0 in table
    # Published (bitsandbytes' create_dynamic_map): 1.0 is positive only, so that 256 values fit.
    assert signed.min() == pytest.approx(-0.99297, abs=1e-5)
    np.testing.assert_allclose(signed[np.searchsorted(signed, 0) + 1], 0.55e-6, rtol=1e-5)
    np.testing.assert_allclose(unsigned[1:3], [3.25e-7, 7.75e-7], rtol=1e-5)
    assert (unsigned >= 0).all()


def test_second_moments_have_no_zero():
    coarse = moment_table(4, 2)
    np.testing.assert_allclose(coarse[1:] / coarse[:-1], 1.8, rtol=1e-6)
    assert coarse.shape == (16,) and coarse[-1] == 1
    smallest, *others = moment_table(8, 2)
    assert smallest == others[0] / 2 > 0
    np.testing.assert_array_equal(others, dynamic_map(8, signed=False)[1:])
    assert 0.0 in moment_table(4, 1) and 0.0 in moment_table(8, 1)


@pytest.mark.parametrize(("bits", "bias", "spread"), [(8, 0.05, 0.3), (4, 0.1, 1.0)])
def test_second_moments_follow_gradients_beside_larger_ones(bits, bias, spread):
    """Rounded to the nearest value they would stay, as they shrink by 0.1 % in a step."""
    row = jnp.arange(256)[:, None]

    def after(optimizer, steps=8000):
        def body(step, state):
            noise = jax.random.normal(jax.random.key(step), (256, 8))
            scale = jnp.where((step < 1000) | (row < 64), 1.0, 0.1)
            return optimizer.update(noise * scale, state)[1]

        params = jnp.zeros((256, 8))
        return jax.jit(lambda: jax.lax.fori_loop(0, steps, body, optimizer.init(params)))()

    adam = optax.scale_by_adam()
    expected = np.asarray(after(adam).nu)
    found = np.asarray(after(quantized_state(adam, bits, min_size=1)).inner_state.nu.materialize())
    for rows in (slice(64), slice(64, None)):
        ratios = found[rows] / expected[rows]
        assert ratios.mean() == pytest.approx(1, abs=bias)
        assert ratios.std() < spread


def test_small_second_moments_keep_updates_small():
    params = jnp.zeros((256, 16))
    gradient = params.at[0].set(1.0)

    def second_update(optimizer):
        # The second row's v is 1e-7 of the largest, which is less than half a step of the table.
        _, state = optimizer.update(gradient.at[1].set(3e-4), optimizer.init(params), params)
        return jax.jit(optimizer.update)(gradient, state, params)[0]

    plain = second_update(optax.adam(1.0))
    ours = second_update(quantized_state(optax.adam(1.0), min_size=1))
    assert np.abs(ours).max() < 1.01
    assert (np.abs(ours[1]) < np.abs(plain[1])).all()


def encode(x, bits=8, block=64):
    """The code form of an array, by way of the momentum of one step of SGD."""
    optimizer = quantized_state(optax.trace(0.9), bits, block, min_size=1)
    _, state = jax.jit(lambda x: optimizer.update({"w": x}, optimizer.init({"w": x})))(x)
    return state.inner_state.trace["w"]


@pytest.mark.parametrize("shape", [(2000,), (100, 7), (2, 70, 50), (4, 640)])
def test_arrays_of_any_shape_keep_their_relative_size(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    array = encode(jnp.asarray(x))
    assert isinstance(array, LutArray) and array.shape == shape and array.bits == 8
    error = np.abs(np.asarray(array.materialize()) - x)
    # A step of the dynamic map is at most 0.9/64 of the block's largest number.
    assert error.max() < 1.001 * 0.9 / 64 * np.abs(x).max()
    again = encode(array.materialize())
    # Encoding twice changes nothing, also where the largest entry of a block is negative.
    np.testing.assert_array_equal(again.words, array.words)
    np.testing.assert_array_equal(again.scales, array.scales)
    assert (np.asarray(array.scales) < 0).any()


def test_zeros_stay_zero_and_storage_is_counted():
    array = encode(jnp.zeros((256, 64)), block=128)
    assert not np.asarray(array.materialize()).any()
    assert array.nbytes == 256 * 64 + 2 * 64 * 4 + 256 * 4
    assert encode(jnp.zeros((256, 64)), bits=4).words.nbytes == 256 * 64 // 2


def train(optimizer, steps=60):
    """Loss of a small regression after some steps."""
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 64), (64, 48)))

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["w"]) - jnp.tanh(x @ target)) ** 2)

    def body(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.zeros((64, 48))}
    params, state = jax.jit(lambda p: jax.lax.fori_loop(0, steps, body, (p, optimizer.init(p))))(
        params
    )
    return float(loss(params)), state


@pytest.mark.parametrize("bits", [8, 4])
def test_training_goes_as_with_full_precision(bits):
    full, _ = train(optax.adam(3e-2))
    low, (state, _) = train(quantized_state(optax.adam(3e-2), bits, min_size=1))
    assert state[0].mu["w"].lut.shape == state[0].nu["w"].lut.shape
    assert (np.asarray(state[0].nu["w"].lut) >= 0).all()
    # The regression starts at a loss of 0.8; measured about 1 % apart at 8 bits.
    assert low < full + {8: 0.02, 4: 0.1}[bits]


def test_stored_projections_are_quantised_too():
    weight = {"w": jax.ShapeDtypeStruct((128, 256), jnp.float32)}
    state = jax.eval_shape(quantized_state(galore(1e-2, rank=64)).init, weight)
    assert isinstance(state.inner_state.maps["w"].basis, LutArray)
    loss, _ = train(quantized_state(galore(3e-2, rank=8, refresh_every=20), min_size=1))
    assert loss < 0.5


class Attention(NamedTuple):
    q: jax.Array
    v: jax.Array


def test_parameters_may_have_the_names_of_moments():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    optimizer = quantized_state(optax.adam(1.0), min_size=1)
    _, state = optimizer.update(Attention(x, x), optimizer.init(Attention(x, x)))
    first, second = state.inner_state[0].mu, state.inner_state[0].nu
    largest = float(jnp.abs(x).max())
    np.testing.assert_allclose(first.v.materialize(), first.q.materialize(), atol=largest / 64)
    assert (np.asarray(first.v.materialize()) < 0).any()
    assert (np.asarray(second.q.lut) > 0).all()


def test_names_of_parameters_are_not_taken_for_fields():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    params = {"w": x, "mu": {"w": x}, "nu": {"w": x}}
    state = quantized_state(optax.scale_by_adam(), min_size=1).init(params).inner_state
    assert (np.asarray(state.mu["w"].lut) < 0).any() and (np.asarray(state.nu["w"].lut) > 0).all()
    assert (np.asarray(state.mu["nu"]["w"].lut) < 0).any()
    assert (np.asarray(state.nu["mu"]["w"].lut) > 0).all()


def test_what_small_changes_add_up_in_is_kept_as_it_is():
    """Gradients that accumulate, and copies of parameters; moments beside them are in codes."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    sums = optax.MultiSteps(optax.adam(1.0), 2).gradient_transformation()
    optimizer = quantized_state(sums, min_size=1)
    params = Attention(x, x)
    _, (state, _) = optimizer.update(params, optimizer.init(params))
    np.testing.assert_array_equal(state.acc_grads.v, x)
    assert is_compressed(state.inner_opt_state[0].mu.v)
    schedule_free = optax.contrib.schedule_free_adamw(1e-2)
    free = quantized_state(schedule_free, min_size=1).init({"w": x}).inner_state
    np.testing.assert_array_equal(free.z["w"], x)
    assert any(map(is_compressed, jax.tree.leaves(free, is_leaf=is_compressed)))


@pytest.mark.parametrize("bits", [8, 4])
def test_moments_of_which_one_is_subtracted_are_kept_as_they_are(bits):
    inner = optax.chain(optax.rmsprop(1e-3, centered=True), optax.scale_by_adam())
    params = {"w": jnp.zeros((64, 64))}
    state = quantized_state(inner, bits, min_size=1).init(params).inner_state
    centred, adam = state[0][0], state[1]
    assert isinstance(centred, optax.ScaleByRStdDevState)
    assert not any(map(is_compressed, jax.tree.leaves(centred, is_leaf=is_compressed)))
    assert is_compressed(adam.mu["w"]) and is_compressed(adam.nu["w"])


def test_momentum_of_sm3_has_signs():
    gradients = {"w": jnp.tile(jnp.array([-1.0, 1.0]), (64, 4))}
    plain = optax.sm3(1e-2, momentum=0.9)
    coded = quantized_state(plain, min_size=64)

    def after(optimizer):
        state, params = optimizer.init(gradients), jax.tree.map(jnp.zeros_like, gradients)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
        return updates["w"]

    np.testing.assert_allclose(after(coded), after(plain), rtol=2e-2)


def test_flattened_second_moments_have_no_zero():
    params = jnp.zeros((64, 64))
    optimizer = quantized_state(optax.flatten(optax.adam(1e-3)), min_size=16)
    state = optimizer.init(params)
    gradients = jnp.full((64, 64), 1e-4).at[:, 0].set(1.0)
    for step in range(3):
        updates, state = optimizer.update(gradients if step == 0 else params, state)
        assert np.abs(updates).max() < 2e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_moments_in_codes_rotate_too(bits):
    params = {"big": jnp.zeros((64, 96)), "small": jnp.zeros((8, 16))}

    def run(inner):
        optimizer = project(inner, Gaussian(8), refresh_every=3, on_refresh="rotate")
        state, generator = optimizer.init(params), np.random.default_rng(0)
        for _ in range(4):
            gradients = {
                k: jnp.asarray(generator.normal(size=p.shape), p.dtype) for k, p in params.items()
            }
            updates, state = optimizer.update(gradients, state)
        return updates, state

    expected, _ = run(optax.trace(0.9))
    found, state = run(quantized_state(optax.trace(0.9), bits, min_size=512))
    moment = state.inner.inner_state.trace["big"]
    assert isinstance(moment, LutArray) and moment.bits == bits
    for name in params:
        error = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < {8: 0.03, 4: 0.2}[bits]


def test_adans_v_has_signs_and_its_n_has_none():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    optimizer = quantized_state(optax.scale_by_adan(), min_size=1)
    _, state = optimizer.update(x, optimizer.init(x))
    _, (state, _) = optimizer.update(-x, state)
    assert all((np.asarray(moment.lut) < 0).any() for moment in (state.m, state.v, state.g))
    assert (np.asarray(state.n.lut) > 0).all()
    # Adafactor's v, without an n beside it, is a second moment.
    factored = quantized_state(optax.scale_by_factored_rms(), min_size=1).init(x).inner_state
    assert (np.asarray(factored.v.lut) > 0).all()


def test_arrays_that_would_grow_stay_dense():
    # A scale a column: 8 bits and 32 for every 2 numbers of 32, and of 16, bits.
    shapes = {"wide": (2, 4096), "tall": (4096, 2), "both": (8, 1024)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    state = jax.eval_shape(quantized_state(optax.trace(0.9)).init, params)
    kinds = {name: isinstance(x, LutArray) for name, x in state.inner_state.trace.items()}
    assert kinds == {"wide": False, "tall": True, "both": True}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    optimizer = quantized_state(optax.trace(0.9))
    _, after = jax.eval_shape(optimizer.update, zeros, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(("arguments", "message"), [({"bits": 3}, "bits=3"), ({"block": 0}, "0")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantized_state(optax.adam(1.0), **arguments)


@pytest.mark.parametrize("attached", [False, True], ids=["adapter", "half of the parameters"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: quantized_state(optax.adam(1e-2), min_size=64),
        lambda: quantized_state(galore(1e-2, rank=2), min_size=64),
        lambda: flora(1e-2, rank=2),
    ],
    ids=["coded", "coded galore", "flora"],
)
def test_adapters_are_containers_of_moments(make, attached):
    """Like a dictionary of their factors by path."""
    base = lutjax.quantize({"kernel": jax.random.normal(jax.random.key(0), (64, 32))}, bits=4)
    adapter = lora.init(base, rank=4, key=jax.random.key(1))
    tree = lutjax.partition(lora.attach(base, adapter))[0] if attached else adapter
    gradients = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), tree)

    def by_path(tree):
        return {path_string(path): a for path, a in jax.tree_util.tree_leaves_with_path(tree)}

    def run(tree, gradients):
        optimizer = make()
        state = optimizer.init(tree)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, tree)
        return by_path(updates)

    updates, expected = run(tree, gradients), run(by_path(tree), by_path(gradients))
    assert [a.shape for a in updates.values()] == [(64, 4), (4, 32)]
    for path, update in expected.items():
        np.testing.assert_allclose(updates[path], update, rtol=1e-5, atol=1e-7)
