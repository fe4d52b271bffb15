"""Calibration of experts, each on the rows that it gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.calibrate import activation_quantiles, hessians, quantize_decoder
from lutjax.models import Decoder
from lutjax.models.blockwise import decoder_blocks
from lutjax.sparsity import (
    greedy_search,
    measure_sparsity,
    plan_greedy,
    plan_uniform,
    sparsify,
)
from tests.lutjax.tiny_checkpoint import TINY

CONFIG = dataclasses.replace(TINY, num_experts=4, num_experts_per_tok=2)
MODEL = Decoder(CONFIG)
UP = "layers/1/mlp/experts/up_proj/kernel"


def apply(params, tokens):
    return MODEL.apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (8, 16), 0, CONFIG.vocab_size)


SIZES = [(3, [1, 0, 2, 0, 0]), (60, [0, 17, 3, 40, 0]), (60, [4, 0, 9, 1, 2])]


@pytest.mark.parametrize(("m", "sizes"), SIZES, ids=str)
def test_statistics_are_of_each_experts_own_rows(m, sizes):
    kernel, x = jnp.ones((5, 8, 4)), jax.random.normal(jax.random.key(0), (m, 8))
    x = x.at[::2, 0].set(0.0)  # zeros count; those that only fill a tile do not

    def fn(params, x):
        return jax.lax.ragged_dot(x, params["kernel"], jnp.array(sizes))

    moments = hessians(fn, {"kernel": kernel}, [x])["kernel"]
    counts = activation_quantiles(fn, {"kernel": kernel}, [x])["kernel"]
    ends = np.cumsum(sizes)
    for i, size in enumerate(sizes):
        rows = np.asarray(x)[ends[i] - size : ends[i]]
        np.testing.assert_allclose(moments[i], rows.T @ rows, rtol=1e-5, atol=1e-5)
        assert counts.total[i] == rows.size
        assert counts.counts[i, -1] == (rows == 0).sum()
        if not size:
            assert counts.quantile(0.9)[i] == 0 and counts.share_below(1.0)[i] == 0
    with pytest.raises(ValueError, match="nothing enters 'kernel'"):
        activation_quantiles(fn, {"kernel": kernel}, [x[:0]])


def test_error_feedback_for_every_expert(params, tokens):
    recipe = lutjax.Recipe.uniform(bits=3, group_size=16)
    exact = jax.jit(apply)(params, tokens)
    run = jax.jit(lutjax.lift(apply, strict=True))

    def error(compressed):
        return float(jnp.mean(jnp.square(run(compressed, tokens) - exact)))

    nearest, fed = lutjax.quantize(params, recipe), quantize_decoder(CONFIG, params, tokens, recipe)
    assert error(fed) < 0.75 * error(nearest)


def test_experts_that_no_token_takes_are_rounded_to_the_nearest(params):
    tokens = jnp.zeros((2, 8), jnp.int32)  # all alike, so two experts of four see all
    seen = jnp.trace(hessians(apply, params, [tokens])[UP], axis1=1, axis2=2) > 0
    assert seen.tolist().count(False) == 2
    recipe = lutjax.Recipe.uniform(bits=3, group_size=16)
    fed, nearest = (
        lutjax.materialize(compressed)["layers"]["1"]["mlp"]["experts"]["up_proj"]["kernel"]
        for compressed in (
            quantize_decoder(CONFIG, params, tokens, recipe),
            lutjax.quantize(params, recipe),
        )
    )
    same = (fed == nearest).all(axis=(1, 2))
    assert (same == ~seen).all()


def test_a_fitted_table_of_an_expert_that_sees_nothing(params):
    kernel = jax.random.normal(jax.random.key(0), (2, 32, 24))
    recipe = lutjax.Recipe.uniform(bits=3, group_size=16, codebook="kmeans")
    x = jax.random.normal(jax.random.key(1), (64, 32))
    moments = jnp.stack([x.T @ x, jnp.zeros((32, 32))])
    found = lutjax.quantize(kernel, recipe, hessians={"array": moments})
    expected = lutjax.quantize(kernel, recipe)
    np.testing.assert_allclose(found.lut[1], expected.lut[1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(found.lut[0], expected.lut[0], rtol=1e-3)


def test_sparsity_of_experts(params, tokens):
    quantiles = activation_quantiles(apply, params, [tokens])
    uniform = plan_uniform(params, quantiles, 0.4)
    assert len(uniform.gates[UP].threshold) == 4
    depth = uniform.over_depth()["layers/*/mlp/experts/up_proj/kernel"]
    assert [block for block, _ in depth] == [0, 1]
    fns, blocks, x = decoder_blocks(CONFIG, params, tokens)
    search = greedy_search(fns, blocks, x, quantiles, limit=0.2, step=0.1)
    for plan, target in ((uniform, 0.4), (plan_greedy(params, quantiles, search, 0.2), 0.2)):
        found = measure_sparsity(apply, sparsify(params, plan), [tokens])
        # Thresholds are the dense model's; masked inputs make later activations smaller.
        assert found.overall == pytest.approx(target, abs=0.05)


def test_sparsity_of_experts_that_no_token_takes(params):
    tokens = jnp.zeros((2, 8), jnp.int32)
    plan = plan_uniform(params, activation_quantiles(apply, params, [tokens]), 0.5)
    assert np.count_nonzero(plan.gates[UP].threshold) == 2
    found = measure_sparsity(apply, sparsify(params, plan), [tokens])
    assert np.isnan(found.shares[UP]).sum() == 2
    assert np.nanmin(found.shares[UP]) > 0.3
    assert found.overall > 0.3  # of the experts that were met
