"""Cyclic precision against its formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.cyclic_precision import (
    cyclic_bits,
    fake_quantize,
    precision_range_test,
    quantize_kernels,
    quantized_activations,
)


def test_bits_follow_the_formula():
    steps, cycles = 3200, 32
    bits = jax.jit(jax.vmap(lambda t: cyclic_bits(t, low=3, high=8, steps=steps, cycles=cycles)))(
        jnp.arange(steps)
    )
    t = np.arange(steps)
    period = steps / cycles
    expected = np.rint(3 + 0.5 * 5 * (1 - np.cos(np.pi * (t % period) / period)))
    # Half-way cases of rint may fall either way in float32.
    assert np.mean(np.asarray(bits) != expected) < 0.01
    assert bits[0] == 3 and bits[99] == 8 and bits[100] == 3
    assert float(bits.mean()) == pytest.approx(5.50, abs=0.03)


@pytest.mark.parametrize("cycles", [3, 7, 12, 24, 60])
@pytest.mark.parametrize("steps", [100, 1000, 64000])
def test_cycles_start_where_they_should(steps, cycles):
    at = np.arange(steps)
    bits = jax.jit(jax.vmap(lambda t: cyclic_bits(t, low=3, high=8, steps=steps, cycles=cycles)))(
        jnp.asarray(at)
    )
    exact = 5.5 - 2.5 * np.cos(np.pi * (at * cycles % steps) / steps)
    # Half-way cases of rint may fall either way in float32.
    clear = np.abs(exact % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(np.asarray(bits)[clear], np.rint(exact)[clear])


def test_long_trainings_do_not_overflow():
    steps, cycles = 10**9, 60
    at = np.array([0, steps // 60, steps // 60 + 1, steps // 2, steps - 1])
    bits = [cyclic_bits(t, low=3, high=8, steps=steps, cycles=cycles) for t in at.tolist()]
    # A cycle has 16666666 2/3 steps.
    assert [int(b) for b in bits] == [3, 8, 3, 3, 8]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("axes", [None, (0,)])
def test_fake_quantisation_is_min_max_rounding(bits, axes):
    x = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    low = x.min(axis=axes, keepdims=True)
    step = (x.max(axis=axes, keepdims=True) - low) / (2**bits - 1)
    actual = fake_quantize(jnp.asarray(x), jnp.asarray(float(bits)), axes)
    np.testing.assert_allclose(actual, np.rint((x - low) / step) * step + low, atol=2e-6)
    assert len(np.unique(np.asarray(actual[:, 0]).round(4))) <= 2**bits


def test_the_gradient_passes_straight_through_and_constants_stay_finite():
    x = jnp.linspace(-1, 1, 7)
    gradient = jax.grad(lambda x: (fake_quantize(x, jnp.asarray(2.0)) * jnp.arange(7.0)).sum())(x)
    np.testing.assert_array_equal(gradient, np.arange(7.0))
    np.testing.assert_array_equal(fake_quantize(jnp.ones(3), jnp.asarray(3.0)), np.ones(3))


def test_a_change_of_bits_compiles_nothing():
    traces = []

    @jax.jit
    def f(x, bits):
        traces.append(None)
        return fake_quantize(x, bits)

    results = [f(jnp.linspace(0, 1, 50), jnp.asarray(float(b))) for b in (2, 3, 8)]
    assert len(traces) == 1
    assert [len(np.unique(np.asarray(r).round(5))) for r in results] == [4, 8, 50]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False)(x)


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="head")(Block(name="layers")(x))


def test_only_kernels_and_inputs_of_blocks_are_rounded():
    x = jax.random.normal(jax.random.key(0), (5, 6))
    params = Layers().init(jax.random.key(1), x)["params"]
    bits = jnp.asarray(2.0)
    rounded = quantize_kernels(params, bits)
    np.testing.assert_array_equal(rounded["head"]["kernel"], params["head"]["kernel"])
    kernel = fake_quantize(params["layers"]["Dense_0"]["kernel"], bits, (-2,))
    np.testing.assert_array_equal(rounded["layers"]["Dense_0"]["kernel"], kernel)
    with quantized_activations(bits):
        actual = Layers().apply({"params": rounded}, x)
    expected = (fake_quantize(x, bits) @ kernel) @ params["head"]["kernel"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_range_test_takes_the_first_precision_that_learns():
    tried = []

    def gain(bits):
        tried.append(bits)
        return {2: 0.01, 3: 0.2, 4: 0.5}[bits]

    assert precision_range_test(gain, threshold=0.1) == 3
    assert tried == [2, 3]
    with pytest.raises(ValueError, match="no precision gains more than threshold=1"):
        precision_range_test(lambda bits: 0.5, threshold=1, high=4)


def test_matrices_are_chosen_by_their_paths():
    params = {"Dense_0": {"kernel": jnp.linspace(0, 1, 12).reshape(4, 3), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"no parameter matches '\*layers/\*kernel'; the nearest"):
        quantize_kernels(params, jnp.asarray(3.0))
    found = quantize_kernels(params, jnp.asarray(1.0), targets=("*kernel",))["Dense_0"]
    assert len(np.unique(found["kernel"][:, 0])) == 2 and found["bias"] is params["Dense_0"]["bias"]
