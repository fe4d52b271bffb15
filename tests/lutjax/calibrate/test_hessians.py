"""Second moments of inputs, and blocks quantised one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax import LutConfig, Recipe, Rule
from lutjax.calibrate import (
    decompose_blocks,
    decompose_decoder,
    hessians,
    quantize_blocks,
    quantize_decoder,
)
from lutjax.models import Decoder, DecoderConfig
from lutjax.models.blockwise import decoder_blocks
from lutjax.models.decoder import RMSNorm

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_a_block_may_be_one_matrix():
    blocks, x = {"0": normal(32, 32), "1": normal(32, 32)}, normal(40, 32)
    done = quantize_blocks(lambda w, x: x @ w, blocks, x, Recipe.uniform(3, 32))
    named = {path: {"kernel": w} for path, w in blocks.items()}
    expected = quantize_blocks(lambda p, x: x @ p["kernel"], named, x, Recipe.uniform(3, 32))
    for path in blocks:
        np.testing.assert_array_equal(done[path].words, expected[path]["kernel"].words)


def test_embeddings_of_a_recipe_have_no_inputs():
    params = {"embed": normal(9, 32), "up": {"kernel": normal(32, 32)}}
    recipe = Recipe.uniform(3, 32, embedding_bits=8)
    fn = lambda p, tokens: p["embed"][tokens] @ p["up"]["kernel"]  # noqa: E731
    assert list(hessians(fn, params, [jnp.arange(9)], recipe=recipe)) == ["up/kernel"]
    blocks, x = {"0": params["up"]}, normal(40, 32)
    block = lambda p, x: x @ p["kernel"]  # noqa: E731
    assert quantize_blocks(block, blocks, x, recipe)["0"]["kernel"].bits == 3
    key = jax.random.key(0)
    assert decompose_blocks(block, blocks, x, recipe, rank=1, key=key)["0"]["kernel"].parts


def test_they_are_sums_over_batches_and_uses():
    params = {"a": normal(6, 4), "b": normal(4, 3)}
    batches = [normal(2, 5, 6), normal(2, 5, 6)]

    def fn(params, x):
        y = jnp.tanh(x @ params["a"])
        return y @ params["b"], (2 * x) @ params["a"]  # "a" is used twice

    recipe = Recipe((Rule("*", LutConfig(group_size="column")),))
    found = hessians(fn, params, batches, recipe=recipe)
    x = np.concatenate(batches).reshape(-1, 6).astype(np.float64)
    y = np.tanh(x @ np.asarray(params["a"], np.float64))
    np.testing.assert_allclose(found["a"], 5 * x.T @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["b"], y.T @ y, rtol=1e-5, atol=1e-4)


def test_layers_of_a_scan_have_their_own():
    stacked, x = normal(3, 4, 4), normal(7, 4)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]

    found = hessians(fn, {"kernel": stacked}, [x])["kernel"]
    y = np.asarray(x)
    for h, w in zip(found, stacked, strict=True):
        np.testing.assert_allclose(h, y.T @ y, rtol=1e-4, atol=1e-5)
        y = np.tanh(y @ np.asarray(w))


def test_parts_of_a_weight_see_what_the_whole_sees():
    params, x = {"qkv": normal(32, 48)}, normal(20, 32)

    def split(params, x):
        return jnp.concatenate([x @ part for part in jnp.split(params["qkv"], 3, axis=1)])

    recipe = Recipe((Rule("*", LutConfig(group_size="column")),))
    found = hessians(split, params, [x], recipe=recipe)["qkv"]
    np.testing.assert_allclose(found, 3 * x.T @ x, rtol=1e-4, atol=1e-4)


def test_weights_whose_inputs_are_not_seen_are_an_error():
    params, recipe = {"a": normal(32, 32), "b": normal(32, 32)}, Recipe.uniform(4, 32)

    def fn(params, x):
        return x @ params["a"], jnp.argmax(x @ params["b"])

    with pytest.raises(ValueError, match="nothing but zeros enters 'b' where it can be seen"):
        hessians(fn, params, [normal(4, 32)], recipe=recipe)


def test_without_batches_there_are_none():
    with pytest.raises(ValueError, match="batches is empty"):
        hessians(lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(4)}, [])


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    model = Decoder(config)
    tokens = jnp.asarray(RNG.integers(0, 64, (6, 40)), jnp.int32)
    return model, model.init(jax.random.key(0), tokens)["params"], tokens


def logits_error(model, params, small, tokens):
    change = lutjax.lift(model.apply)({"params": small}, tokens) - model.apply(
        {"params": params}, tokens
    )
    return float(jnp.linalg.norm(change))


def test_a_decoder_changes_less_than_by_rounding_alone(decoder):
    model, params, tokens = decoder
    recipe = Recipe.uniform(3, 32)
    small = quantize_decoder(model.config, params, tokens, recipe, batch_size=4)
    rounded = lutjax.quantize(params, recipe)
    assert jax.tree.structure(small) == jax.tree.structure(rounded)
    other = jnp.asarray(RNG.integers(0, 64, (4, 40)), jnp.int32)  # not what it was calibrated on
    error = logits_error(model, params, small, other)
    assert error < 0.85 * logits_error(model, params, rounded, other)


def test_blocks_that_alternate_make_up_the_decoder(decoder):
    _, params, tokens = decoder
    config = dataclasses.replace(
        decoder[0].config,
        sliding_window=8,
        sliding_layers=(True, False),
        sliding_rope_theta=100.0,
        scale_embeddings=True,
    )
    fns, blocks, x = decoder_blocks(config, params, tokens)
    assert fns["layers/0"] is not fns["layers/1"]
    for path, block in blocks.items():
        x = fns[path](block, x)
    x = RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x)
    expected = Decoder(config).apply({"params": params}, tokens)
    # The same products of float32, compiled on their own.
    np.testing.assert_allclose(x @ params["lm_head"]["kernel"], expected, rtol=1e-4, atol=1e-5)
    recipe = Recipe.uniform(3, 32)
    small = quantize_decoder(config, params, tokens, recipe, batch_size=6)
    error = logits_error(Decoder(config), params, small, tokens)
    assert error < 0.85 * logits_error(
        Decoder(config), params, lutjax.quantize(params, recipe), tokens
    )


def test_taking_a_decoder_apart_can_be_traced(decoder):
    model, params, tokens = decoder
    apart = jax.jit(lambda params, tokens: decoder_blocks(model.config, params, tokens)[2])
    np.testing.assert_array_equal(
        apart(params, tokens), decoder_blocks(model.config, params, tokens)[2]
    )
    with pytest.raises(ValueError, match="must be integers"):
        apart(params, tokens[0])


def test_later_blocks_see_what_the_quantised_ones_before_give():
    blocks = {"first": {"kernel": normal(32, 32)}, "second": {"kernel": normal(32, 32)}}
    x = normal(200, 32)

    def fn(params, x):
        return jnp.tanh(x @ params["kernel"])

    recipe = Recipe.uniform(2, 32)
    done = quantize_blocks(fn, blocks, x, recipe, batch_size=50)
    y = lutjax.lift(fn)(done["first"], x)
    for name, inputs in {"first": x, "second": y}.items():
        alone = lutjax.quantize(
            blocks[name], bits=2, group_size=32, hessians={"kernel": inputs.T @ inputs}
        )["kernel"]
        # Sums of products in another order may move a weight over a boundary.
        agree = done[name]["kernel"].materialize() == alone.materialize()
        assert jnp.mean(agree) > 0.98


def test_rules_are_those_of_full_paths(decoder):
    model, params, tokens = decoder
    fns, blocks, x = decoder_blocks(model.config, params, tokens)
    rules = (
        Rule("layers/0/*/down_proj/kernel", LutConfig(8, 32)),
        Rule("layers/1/*", LutConfig.higgs(2, 32)),
    )
    done = quantize_blocks(fns, blocks, x, Recipe(rules), batch_size=6)
    assert done["layers/0"]["mlp"]["down_proj"]["kernel"].bits == 8
    assert isinstance(done["layers/0"]["mlp"]["up_proj"]["kernel"], jax.Array)
    assert type(done["layers/1"]["self_attn"]["q_proj"]["kernel"]).__name__ == "RotatedArray"


def test_what_lies_outside_the_blocks_is_rounded(decoder):
    model, params, tokens = decoder
    rules = (Rule("lm_head/kernel", LutConfig(4, 32)), Rule("layers/1/*", LutConfig(8, 32)))
    small = quantize_decoder(model.config, params, tokens, Recipe(rules), batch_size=6)
    rounded = lutjax.quantize(params, Recipe(rules))
    assert jax.tree.structure(small) == jax.tree.structure(rounded)
    head, expected = (p["lm_head"]["kernel"].materialize() for p in (small, rounded))
    np.testing.assert_array_equal(head, expected)


def test_a_low_rank_part_takes_up_what_rounding_leaves(decoder):
    model, params, tokens = decoder
    arguments = {"recipe": Recipe.uniform(3, 32), "batch_size": 6}
    rounded = quantize_decoder(model.config, params, tokens, **arguments)
    key = jax.random.key(0)
    small = decompose_decoder(model.config, params, tokens, **arguments, rank=8, key=key)
    blind = lutjax.decompose(params, arguments["recipe"], rank=8, method="lorc", key=key)
    assert jax.tree.structure(small) == jax.tree.structure(blind)
    other = jnp.asarray(RNG.integers(0, 64, (4, 40)), jnp.int32)
    error = logits_error(model, params, small, other)
    assert error < 0.9 * logits_error(model, params, rounded, other)
    assert error < 0.9 * logits_error(model, params, blind, other)


def test_blocks_are_decomposed_with_the_inputs_that_those_before_give():
    blocks = {"first": {"kernel": normal(32, 32)}, "second": {"kernel": normal(32, 32)}}
    x, recipe, key = normal(200, 32), Recipe.uniform(2, 32), jax.random.key(0)

    def fn(params, x):
        return jnp.tanh(x @ params["kernel"])

    done = decompose_blocks(fn, blocks, x, recipe, rank=4, key=key, svd="dense", batch_size=50)
    y = lutjax.lift(fn)(done["first"], x)
    alone = lutjax.decompose(
        blocks["second"],
        recipe,
        rank=4,
        method="lorc",
        key=key,
        svd="dense",
        hessians={"kernel": y.T @ y},
    )
    errors = [
        float(jnp.linalg.norm(y @ (blocks["second"]["kernel"] - d["kernel"].materialize())))
        for d in (done["second"], alone)
    ]
    # Sums of products in another order may move a weight over a boundary.
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_a_rank_that_does_not_fit_is_refused_before_anything_runs(decoder):
    model, params, tokens = decoder
    arguments = {"rank": 65, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="rank=65 does not fit 'layers/0/"):
        decompose_decoder(model.config, params, tokens, Recipe.uniform(3, 32), **arguments)


def test_bad_arguments_are_refused_before_anything_runs(decoder):
    model, params, tokens = decoder
    fns, blocks, x = decoder_blocks(model.config, params, tokens)
    for wrong, message in (
        (np.asarray(tokens) + 10**6, "tokens go from 10000.*; those of this model are 0 … "),
        (np.asarray(tokens) - 10**6, "tokens go from -"),
        (tokens[0], "must be integers"),
        (tokens.astype("float32"), "must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_decoder(model.config, params, wrong)
    with pytest.raises(ValueError, match="but no layers; give variables"):
        quantize_decoder(model.config, {"params": params}, tokens, Recipe.uniform(4, 32))
    with pytest.raises(TypeError, match="the recipe is a LutConfig; give a Recipe"):
        quantize_blocks(fns, blocks, x, LutConfig())
    with pytest.raises(ValueError, match="'layers/7/\\*' matches no parameter"):
        quantize_blocks(fns, blocks, x, Recipe((Rule("layers/7/*", LutConfig()),)))
    with pytest.raises(ValueError, match="no function for the block 'layers/1'"):
        quantize_blocks({"layers/0": fns["layers/0"]}, blocks, x)
    for size in (0, 7):
        with pytest.raises(ValueError, match=f"batch_size={size} must be from 1 to the 6 rows"):
            quantize_blocks(fns, blocks, x, batch_size=size)
    with pytest.raises(ValueError, match="NaN"):
        quantize_blocks(fns, blocks, x.at[0, 0, 0].set(jnp.nan))


def test_a_weight_that_enters_a_custom_derivative_is_seen():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    x = jax.random.normal(jax.random.key(0), (8, 16))
    found = hessians(lambda p, x: product(x, p["kernel"]), {"kernel": jnp.ones((16, 4))}, [x])
    np.testing.assert_allclose(found["kernel"], x.T @ x, rtol=1e-5, atol=1e-5)  # float32
