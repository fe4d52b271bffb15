from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.calibrate import Fisher, fisher, next_token_loss
from lutjax.models import Decoder, DecoderConfig, stack_layers
from lutjax.transforms.recipe import LutConfig, Recipe, Rule

CONFIG = DecoderConfig(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
)
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (4, 8), 0, 31))
BATCHES = [TOKENS[:2], TOKENS[2:]]


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    return decoder, params


def linear_loss(params, sample):
    """Gradient of one sample: x dy^T with dy = 2 (x W - y)."""
    return jnp.sum((sample["x"] @ params["kernel"] - sample["y"]) ** 2)


def linear_problem(samples=5):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 3)).astype(np.float32)
    data = {
        "x": rng.standard_normal((samples, 8)).astype(np.float32),
        "y": rng.standard_normal((samples, 3)).astype(np.float32),
    }
    return {"kernel": jnp.asarray(weight)}, data


def oracle(params, data):
    weight = np.asarray(params["kernel"], np.float64)
    gradients = [
        np.outer(x, 2 * (x @ weight - y))
        for x, y in zip(data["x"].astype(np.float64), data["y"].astype(np.float64), strict=True)
    ]
    return np.mean(np.square(gradients), axis=0)


def test_against_the_formula():
    params, data = linear_problem()
    expected = oracle(params, data)
    batches = [{k: v[:2] for k, v in data.items()}, {k: v[2:] for k, v in data.items()}]
    recipe = Recipe((Rule("kernel", LutConfig()),))
    full = fisher(linear_loss, params, batches, keep="full", recipe=recipe)
    np.testing.assert_allclose(full["kernel"], expected, rtol=1e-4)
    means = fisher(linear_loss, params, batches, recipe=recipe)
    np.testing.assert_allclose(means["kernel"].rows, expected.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(means["kernel"].columns, expected.mean(axis=0), rtol=1e-4)
    assert means.samples == full.samples == 5
    # The square of the mean gradient would be something else.
    one = fisher(linear_loss, params, [jax.tree.map(lambda a: a[:1], data)], keep="full")
    assert not np.allclose(one["kernel"], full["kernel"], rtol=0.1)


def test_axes_follow_the_recipe():
    params, data = linear_problem()
    transposed = {"weight": params["kernel"].T}

    def loss(params, sample):
        return linear_loss({"kernel": params["weight"].T}, sample)

    rows = fisher(linear_loss, params, [data])["kernel"].rows
    np.testing.assert_allclose(fisher(loss, transposed, [data])["weight"].rows, rows, rtol=1e-5)


def test_compressed_weights_get_the_gradient_of_the_dense_ones(model):
    decoder, params = model
    compressed = lutjax.quantize(params, bits=3, group_size=16)
    lifted = next_token_loss(lutjax.lift(decoder.apply, strict=True))
    dense = next_token_loss(decoder.apply)
    expected = fisher(dense, lutjax.materialize(compressed), BATCHES, keep="full")
    result = fisher(lifted, compressed, BATCHES, keep="full")
    assert set(result) == set(expected) and len(result) == 14
    for path in expected:
        scale = float(expected[path].max())  # float32 sums in another order
        np.testing.assert_allclose(result[path], expected[path], rtol=2e-3, atol=1e-3 * scale)


def test_stacked_layers(model):
    _, params = model
    scanned = Decoder(DecoderConfig(**{**vars(CONFIG), "scan_layers": True}))
    stacked = stack_layers(params)
    compressed = lutjax.quantize(stacked, bits=4, group_size=16)
    lifted = fisher(next_token_loss(lutjax.lift(scanned.apply)), compressed, BATCHES)
    dense = fisher(next_token_loss(scanned.apply), lutjax.materialize(compressed), BATCHES)
    for path in dense:
        np.testing.assert_allclose(lifted[path].columns, dense[path].columns, rtol=2e-3, atol=1e-9)
    assert dense["layers/mlp/up_proj/kernel"].rows.shape == (2, 32)


def test_it_serves_decompose():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)}
    scale = rng.gamma(0.5, size=64).astype(np.float32)  # inputs of very different size
    x = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32) * scale[None, :]
    data = {"x": x, "y": jnp.zeros((16, 32))}
    information = fisher(linear_loss, params, [data])
    arguments = {"rank": 4, "key": jax.random.key(0), "rounds": 2}
    recipe = Recipe.uniform(2, 16)
    plain = lutjax.decompose(params, recipe, **arguments)
    weighted = lutjax.decompose(params, recipe, fisher=information, **arguments)

    def output_error(tree):
        return float(jnp.linalg.norm(x @ (tree["kernel"].materialize() - params["kernel"])))

    assert output_error(weighted) < 0.9 * output_error(plain)


def test_save_and_load(tmp_path):
    params, data = linear_problem()
    for keep in ("means", "full"):
        result = fisher(linear_loss, params, [data], keep=keep)
        result.save(tmp_path / keep)
        loaded = Fisher.load(tmp_path / keep)
        assert loaded.samples == 5 and repr(loaded) == "Fisher(1 parameters, 5 samples)"
        jax.tree.map(np.testing.assert_array_equal, dict(loaded), dict(result))
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a Fisher file"):
        Fisher.load(tmp_path / "broken")


class Killed(Exception):
    pass


def test_resume_after_a_kill(tmp_path):
    params, data = linear_problem(8)
    batches = [jax.tree.map(lambda a, i=i: a[i : i + 2], data) for i in range(0, 8, 2)]
    expected = fisher(linear_loss, params, batches)
    checkpoint = tmp_path / "running"

    def stopping():
        yield from batches[:3]
        raise Killed

    with pytest.raises(Killed):
        fisher(linear_loss, params, stopping(), checkpoint=checkpoint, save_every=2)
    with pytest.raises(ValueError, match="not a finished Fisher file"):
        Fisher.load(checkpoint)
    with pytest.raises(ValueError, match="other weights or settings"):
        fisher(linear_loss, params, batches, checkpoint=checkpoint, keep="full")
    other = {"kernel": params["kernel"] + 1}
    with pytest.raises(ValueError, match="other weights or settings"):
        fisher(linear_loss, other, batches, checkpoint=checkpoint)
    # The first two batches are not read again: poison them.
    poisoned = [jax.tree.map(lambda a: a * np.nan, b) for b in batches[:2]] + batches[2:]
    result = fisher(linear_loss, params, poisoned, checkpoint=checkpoint)
    np.testing.assert_array_equal(result["kernel"].rows, expected["kernel"].rows)
    assert result.samples == 8 and not checkpoint.exists()


def test_bad_input():
    params, data = linear_problem()
    with pytest.raises(ValueError, match="batches is empty"):
        fisher(linear_loss, params, [])
    with pytest.raises(ValueError, match="at least one"):
        fisher(linear_loss, params, [jax.tree.map(lambda a: a[:0], data)])
    with pytest.raises(ValueError, match="the same number"):
        fisher(linear_loss, params, [{"x": data["x"], "y": data["y"][:2]}])
    bad = data | {"y": data["y"] * np.nan}
    with pytest.raises(ValueError, match="batch 1 is NaN"):
        fisher(linear_loss, params, [data, bad])
    with pytest.raises(ValueError, match="keep='diagonal'"):
        fisher(linear_loss, params, [data], keep="diagonal")
    with pytest.raises(ValueError, match="reaches no matrix"):
        fisher(linear_loss, params, [data], recipe=Recipe((Rule("*", None),)))
