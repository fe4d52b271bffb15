"""Scales that are learnt so that outputs stay those of the dense model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax import DoubleQuant, Recipe
from lutjax.arrays import LutArray, QuantizedScales, is_compressed
from lutjax.calibrate import kl_divergence, learn_scales, rescale, scale_factors
from lutjax.models import Decoder, DecoderConfig
from pallas_kernels.scales import expanded

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def product(params, x):
    return x @ params["kernel"]


def squared_error(y, aim):
    return jnp.mean(jnp.square(y - aim))


def decoder(**changes):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    config = DecoderConfig(vocab_size=24, num_layers=1, **sizes, **changes)
    tokens = jnp.asarray(RNG.integers(0, 24, size=(3, 2, 12)))
    model = Decoder(config)
    params = jax.tree.map(lambda p: 3 * p, model.init(jax.random.key(0), tokens[0])["params"])
    return lambda params, tokens: model.apply({"params": params}, tokens), params, list(tokens)


def lut_arrays(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, LutArray))
    return [leaf for leaf in leaves if isinstance(leaf, LutArray)]


def test_gradients_are_those_of_the_formula():
    # dL/ds = sum over a group of dL/dw * lut[code], and the factor is the scale's logarithm.
    x = normal(9, 40)
    params = lutjax.quantize({"kernel": normal(40, 6)}, Recipe.uniform(3, group_size=16))
    array = params["kernel"]

    def loss(factors):
        return jnp.sum(jnp.sin(lutjax.lift(product)(rescale(params, factors), x)))

    (found,) = jax.grad(loss)(scale_factors(params)).values()
    weight = np.asarray(array.materialize(), np.float64)
    x64 = np.asarray(x, np.float64)
    per_weight = x64.T @ np.cos(x64 @ weight) * weight  # lut[code] times the scale is the weight
    expected = np.add.reduceat(per_weight, [0, 16, 32], axis=0)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_with_one_scale_a_column_they_are_the_least_squares_ones():
    x, dense = normal(50, 24), {"kernel": normal(24, 5)}
    recipe = Recipe.uniform(2, group_size="column", scale_dtype="float32")
    start = lutjax.quantize(dense, recipe)
    learnt = learn_scales(
        product, start, dense, [x], loss=squared_error, epochs=600, learning_rate=0.02
    )
    fixed = np.asarray(start["kernel"].materialize() / start["kernel"].scales, np.float64)
    y, z = np.asarray(x, np.float64) @ np.asarray(dense["kernel"]), np.asarray(x) @ fixed
    best = np.sum(y * z, axis=0) / np.sum(z * z, axis=0)
    np.testing.assert_allclose(learnt["kernel"].scales[0], best, rtol=1e-4)
    assert not np.allclose(start["kernel"].scales[0], best, rtol=0.05)


RECIPES = {
    "NormalFloat": Recipe.uniform(3, group_size=32),
    "offsets": Recipe.uniform(2, group_size=16, codebook="affine"),
    "quantised scales": Recipe.uniform(
        3, group_size=16, double_quant=DoubleQuant(bits=6, block=8, dtype="float16")
    ),
    "rotated pairs": Recipe.higgs(2, group_size=32),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_decoder_comes_nearer_to_the_dense_one(recipe):
    # One recipe with layers in a scan too, whose weights are stacked.
    scan_layers = recipe is RECIPES["quantised scales"]
    fn, dense, batches = decoder(scan_layers=scan_layers)
    start = lutjax.quantize(dense, recipe)
    learnt = learn_scales(fn, start, dense, batches, epochs=10, learning_rate=0.01)

    run = jax.jit(lutjax.lift(fn))

    def divergence(params):
        outputs = [(run(params, b), run(dense, b)) for b in batches]
        return float(np.mean([kl_divergence(y, aim) for y, aim in outputs]))

    assert divergence(learnt) < 0.85 * divergence(start)
    # Everything but the scales is the same, bit for bit, and scales are stored as they were.
    assert jax.tree.structure(learnt) == jax.tree.structure(start)
    for new, old in zip(jax.tree.leaves(learnt), jax.tree.leaves(start), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    pairs = list(zip(lut_arrays(learnt), lut_arrays(start), strict=True))
    assert len(pairs) == 7
    for new, old in pairs:
        np.testing.assert_array_equal(new.words, old.words)
        np.testing.assert_array_equal(new.lut, old.lut)
        assert type(new.scales) is type(old.scales)
        if isinstance(old.scales, QuantizedScales):
            assert (new.scales.bits, new.scales.block) == (old.scales.bits, old.scales.block)
        assert not np.array_equal(expanded(new.scales), expanded(old.scales))
    for new, old in zip(*map(dense_leaves, (learnt, start)), strict=True):
        np.testing.assert_array_equal(new, old)


def dense_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    return [leaf for leaf in leaves if not is_compressed(leaf)]


def test_low_rank_parts_stay_and_their_base_learns():
    x, dense = normal(30, 64), {"kernel": normal(64, 48)}
    start = lutjax.decompose(dense, Recipe.uniform(2), rank=4, key=jax.random.key(0))
    learnt = learn_scales(
        product, start, dense, [x], loss=squared_error, epochs=50, learning_rate=0.01
    )
    (path,) = scale_factors(start)
    assert path == "kernel/parts/0"
    old, new = start["kernel"].parts, learnt["kernel"].parts
    for a, b in zip(jax.tree.leaves(old[1]), jax.tree.leaves(new[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    aim = product(dense, x)
    errors = [float(squared_error(lutjax.lift(product)(p, x), aim)) for p in (start, learnt)]
    assert errors[1] < 0.9 * errors[0]


def test_scales_that_are_rounded_coarsely_learn_too():
    # Outputs are those of the rounded scales: trained without, these end worse than they began.
    dense, batches = {"kernel": normal(64, 256)}, [normal(32, 64) for _ in range(8)]
    coarse = DoubleQuant(bits=3, block=16)
    start = lutjax.quantize(dense, Recipe.uniform(3, group_size=16, double_quant=coarse))
    learnt = learn_scales(product, start, dense, batches, epochs=8)

    def divergence(params):
        outputs = [(lutjax.lift(product)(params, x), product(dense, x)) for x in batches]
        return float(np.mean([kl_divergence(y, aim) for y, aim in outputs]))

    assert divergence(learnt) < 0.95 * divergence(start)


def test_weights_that_are_not_used_stay():
    dense = {"kernel": normal(64, 8), "other": normal(64, 300)}
    double = DoubleQuant(bits=8, block=256, dtype="bfloat16")
    start = lutjax.quantize(dense, Recipe.uniform(3, group_size=16, double_quant=double))
    learnt = learn_scales(product, start, dense, [normal(8, 64)], epochs=4)
    for name, same in (("kernel", False), ("other", True)):
        pairs = zip(jax.tree.leaves(start[name]), jax.tree.leaves(learnt[name]), strict=True)
        assert all(np.array_equal(old, new) for old, new in pairs) == same


def test_factors_are_relative_to_the_scales():
    params = lutjax.quantize(
        {"a": normal(32, 3), "b": normal(32, 3)}, Recipe.uniform(4, group_size=16)
    )
    doubled = rescale(params, {"a": jnp.full((2, 3), jnp.log(2.0))})
    np.testing.assert_allclose(doubled["a"].materialize(), 2 * params["a"].materialize(), rtol=1e-6)
    np.testing.assert_array_equal(doubled["b"].materialize(), params["b"].materialize())


def test_divergence_of_logits_is_that_of_the_distributions():
    logits, aim = normal(4, 7), normal(4, 7)
    q, p = (np.exp(np.asarray(a, np.float64)) for a in (logits, aim))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    expected = np.mean(np.sum(p * np.log(p / q), axis=-1))
    np.testing.assert_allclose(kl_divergence(logits, aim), expected, rtol=1e-5)
    np.testing.assert_allclose(kl_divergence(aim + 5, aim), 0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batches": []}, "batches is empty"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a positive number"),
        ({"params": {"kernel": jnp.ones((4, 4))}}, "no lookup-table weights"),
    ],
)
def test_what_cannot_be_learnt_is_refused(changes, message):
    dense = {"kernel": normal(32, 4)}
    start = lutjax.quantize(dense, Recipe.uniform(4, group_size=32))
    arguments = {"params": start, "dense": dense, "batches": [normal(2, 32)]}
    with pytest.raises(ValueError, match=message):
        learn_scales(product, **(arguments | changes))


def test_weights_that_were_reordered_for_kernels_are_refused():
    params = lutjax.quantize({"a": normal(64, 32), "b": normal(64, 32)}, Recipe.uniform(4))
    ready = lutjax.prepack({"b": params["b"]}, device_kind="TPU v6 lite")
    with pytest.raises(ValueError, match=r"b is prepacked: .* learn first"):
        scale_factors(params | ready)


def test_factors_of_other_weights_or_shapes_are_refused():
    params = lutjax.quantize({"kernel": normal(32, 4)}, Recipe.uniform(4, group_size=16))
    with pytest.raises(ValueError, match="'kernal' is the path of no lookup-table weight"):
        rescale(params, {"kernal": jnp.zeros((2, 4))})
    with pytest.raises(ValueError, match=r"kernel: factors of shape \(1, 4\)"):
        rescale(params, {"kernel": jnp.zeros((1, 4))})
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3\) and targets \(3,\)"):
        kl_divergence(jnp.zeros((2, 3)), jnp.zeros(3))


def test_a_loss_that_is_not_finite_names_its_step():
    dense = {"kernel": normal(32, 4)}
    start = lutjax.quantize(dense, Recipe.uniform(4, group_size=32))
    good, bad = normal(3, 32), jnp.full((3, 32), jnp.nan)
    with pytest.raises(ValueError, match="step 0: the loss is nan; the model or the data"):
        learn_scales(product, start, dense, [bad, good])
    with pytest.raises(ValueError, match="step 1: the loss is nan; lower learning_rate"):
        learn_scales(product, start, dense, [good, bad])
