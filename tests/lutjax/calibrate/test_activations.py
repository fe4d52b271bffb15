"""Streaming quantiles of activations, and observation through lifted functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.calibrate import ActivationQuantiles, MagnitudeHistogram, activation_quantiles
from lutjax.calibrate.histogram import RELATIVE_ERROR
from lutjax.calibrate.observe import observe
from lutjax.models import Decoder, stack_layers


def layer(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def layer_params(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "a": {"kernel": jax.random.normal(a, (64, 96))},
        "b": {"kernel": jax.random.normal(b, (96, 32)) / 8},
    }


@pytest.mark.parametrize("kind", ["normal", "laplace", "lognormal", "uniform"])
def test_quantiles_are_within_the_stated_error(kind):
    x = getattr(np.random.default_rng(0), kind)(size=50_000).astype(np.float32)
    parts = [MagnitudeHistogram.of(jnp.asarray(part)) for part in np.array_split(x, 3)]
    merged = parts[0] + parts[1] + parts[2]
    assert (merged.counts == MagnitudeHistogram.of(jnp.asarray(x)).counts).all()
    assert merged.quantile(0.0) == 0
    for p in (0.01, 0.25, 0.5, 0.75, 0.99, 0.9993, 1.0):
        exact = np.quantile(np.abs(x), p, method="inverted_cdf")
        found = merged.quantile(p)
        assert abs(found - exact) <= RELATIVE_ERROR * exact
        # interpolation makes the share, which is what sparsity is, far better than the bound
        if 0 < p < 1:
            assert abs(np.mean(np.abs(x) <= found) - p) < 2e-3
            assert abs(merged.share_below(found) - p) < 1e-6


def test_zeros_and_extremes():
    x = jnp.asarray([0.0] * 60 + [1e-30, 1e30] + [2.0] * 38)
    histogram = MagnitudeHistogram.of(x)
    assert histogram.total == 100
    assert histogram.quantile(0.6) == 0 and histogram.quantile(0.61) == 0
    assert histogram.quantile(0.9) == pytest.approx(2.0, rel=RELATIVE_ERROR)
    assert histogram.share_below(0.0) == pytest.approx(0.61)  # 1e-30 counts as zero
    with pytest.raises(ValueError, match="outside"):
        histogram.quantile(1.5)
    with pytest.raises(ValueError, match="empty"):
        MagnitudeHistogram(np.zeros_like(histogram.counts)).quantile(0.5)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_projection_by_path(compressed, tmp_path):
    params = layer_params()
    if compressed:
        params = lutjax.quantize(params, bits=4, group_size=32)
    batches = [jax.random.normal(jax.random.key(i), (20, 64)) for i in range(3)]
    found = activation_quantiles(layer, params, batches)
    assert set(found) == {"a/kernel", "b/kernel"}
    dense = lutjax.materialize(params)
    x = np.concatenate(batches)
    inner = np.tanh(x @ np.asarray(dense["a"]["kernel"]))
    for path, values in (("a/kernel", x), ("b/kernel", inner)):
        assert found[path].total == values.size
        exact = np.quantile(np.abs(values), [0.25, 0.5, 0.9])
        got = [found[path].quantile(p).item() for p in (0.25, 0.5, 0.9)]
        np.testing.assert_allclose(got, exact, rtol=RELATIVE_ERROR)
    found.save(tmp_path / "q.json")
    again = ActivationQuantiles.load(tmp_path / "q.json")
    assert all((again[p].counts == found[p].counts).all() for p in found)
    doubled = found + again
    assert doubled["a/kernel"].total == 2 * x.size
    assert (tmp_path / "q.json").stat().st_size < 40_000


def test_wina_counts_weighted_magnitudes():
    params = layer_params()
    x = jax.random.normal(jax.random.key(1), (50, 64))
    found = activation_quantiles(layer, params, [x], score="wina")
    norms = np.linalg.norm(np.asarray(params["a"]["kernel"]), axis=1)
    exact = np.quantile(np.abs(np.asarray(x)) * norms, 0.5)
    assert found["a/kernel"].quantile(0.5) == pytest.approx(exact, rel=RELATIVE_ERROR)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_decoder_keeps_layers_apart(tiny_config, remat):
    import dataclasses

    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    plain = Decoder(tiny_config)
    params = plain.init(jax.random.key(0), tokens)["params"]
    scanned = Decoder(dataclasses.replace(tiny_config, scan_layers=True, remat=remat))
    by_layer = activation_quantiles(lambda p, t: plain.apply({"params": p}, t), params, [tokens])
    stacked = activation_quantiles(
        lambda p, t: scanned.apply({"params": p}, t), stack_layers(params), [tokens]
    )
    assert len(by_layer) == 7 * tiny_config.num_layers and len(stacked) == 7
    for path, histogram in stacked.items():
        for i in range(tiny_config.num_layers):
            single = by_layer[path.replace("layers/", f"layers/{i}/")]
            # float noise moves values across the edges of bins
            p = np.linspace(0.1, 0.9, 5)
            np.testing.assert_allclose(
                [histogram.quantile(q)[i] for q in p],
                [single.quantile(q) for q in p],
                rtol=2 * RELATIVE_ERROR,
            )


def test_observation_changes_nothing_and_holds_no_gradient():
    params = layer_params()
    x = jax.random.normal(jax.random.key(1), (5, 64))
    largest = lambda weight, x: jnp.max(jnp.abs(x))[None]  # noqa: E731
    statistics = {"b/kernel": (lutjax.arrays.DenseArray.of, 1, largest)}
    found = jax.jit(observe(layer, statistics))(params, x)
    inner = jnp.abs(jnp.tanh(x @ params["a"]["kernel"])).max()
    np.testing.assert_allclose(found["b/kernel"], inner[None], rtol=1e-6)


def test_bad_input():
    params = layer_params()
    x = jnp.ones((2, 64))
    with pytest.raises(ValueError, match="2 activations that enter 'a/kernel' are NaN"):
        activation_quantiles(layer, params, [x.at[0, :2].set(jnp.nan)])
    with pytest.raises(ValueError, match="batches is empty"):
        activation_quantiles(layer, params, [])
    with pytest.raises(ValueError, match="nothing enters 'b/kernel'"):
        activation_quantiles(lambda p, x: x @ p["a"]["kernel"], params, [x])
    with pytest.raises(TypeError, match="no floating-point output"):
        activation_quantiles(lambda p, x: jnp.argmax(layer(p, x), -1), params, [x])
    with pytest.raises(ValueError, match="score='l2'"):
        activation_quantiles(layer, params, [x], score="l2")


def test_parts_of_models_need_no_embeddings():
    params = {"up": {"kernel": jnp.ones((64, 32))}}
    recipe = lutjax.Recipe.uniform(4, 32, embedding_bits=8)
    quantiles = activation_quantiles(
        lambda p, x: x @ p["up"]["kernel"], params, [jnp.ones((3, 64))], recipe=recipe
    )
    assert list(quantiles) == ["up/kernel"]


def test_bad_file(tmp_path):
    (tmp_path / "bad.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match=r"bad.json is no file of activation quantiles"):
        ActivationQuantiles.load(tmp_path / "bad.json")
