"""A decoder with joined projections is the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax import LutConfig, Recipe, Rule
from lutjax.arrays import ConcatArray, LutArray
from lutjax.models import Decoder, init_cache
from tests.lutjax.tiny_checkpoint import TINY as CONFIG

VARIANTS = {
    "plain": {},
    "scanned": {"scan_layers": True, "remat": True},
    "biases and norms": {"qkv_bias": True, "qk_norm": True},
    "experts": {"num_experts": 3, "num_experts_per_tok": 2, "expert_bias": True},
    "scanned experts": {"num_experts": 3, "num_experts_per_tok": 2, "scan_layers": True},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 5)), jnp.int32)


def parameters(config):
    """Random ones; biases too, which would start at zero."""
    params = jax.jit(Decoder(config).init)(jax.random.key(0), TOKENS)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [
        0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_predicts_the_same(variant, compressed):
    config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    params = parameters(config)
    if compressed:
        params = lutjax.quantize(params, bits=4, group_size=16)
    fused = lutjax.fuse_projections(params)
    apply = lutjax.lift(Decoder(config).apply, strict=True)

    def run(params):
        logits, cache = apply({"params": params}, TOKENS, cache=init_cache(config, 2, 8))
        return logits, apply({"params": params}, TOKENS[:, :1], cache=cache)[0]

    for actual, expected in zip(jax.jit(run)(fused), jax.jit(run)(params), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_four_products_a_block_are_left():
    params = lutjax.quantize(parameters(CONFIG), bits=4, group_size=16)
    fused = lutjax.fuse_projections(params)
    report = lutjax.lift.report(Decoder(CONFIG).apply, {"params": fused}, TOKENS)
    assert not report.materialized and not report.unused
    names = [use.path.removeprefix("params/layers/0/") for use in report.fused][:4]
    assert names == [
        "self_attn/qkv_proj/kernel",
        "self_attn/o_proj/kernel",
        "mlp/gate_up_proj/kernel",
        "mlp/down_proj/kernel",
    ]
    assert len(report.fused) == 8
    summary = lutjax.summarize(fused), lutjax.summarize(params)
    assert summary[0].compressed.nbytes < summary[1].compressed.nbytes  # fewer tables
    assert fused["norm"]["scale"] is params["norm"]["scale"]
    assert "q_proj" in params["layers"]["0"]["self_attn"]  # the argument is left as it is


def test_quantised_before_or_after_it_is_the_same():
    params = parameters(CONFIG)
    before = lutjax.fuse_projections(lutjax.quantize(params, bits=4, group_size=16))
    after = lutjax.quantize(lutjax.fuse_projections(params), bits=4, group_size=16)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_projections_of_other_kinds_stay_apart():
    configs = {"*q_proj*": LutConfig(3, 16), "*k_proj*": None, "*": LutConfig(4, 16)}
    recipe = Recipe(tuple(Rule(pattern, config) for pattern, config in configs.items()))
    fused = lutjax.fuse_projections(lutjax.quantize(parameters(CONFIG), recipe))
    block = fused["layers"]["0"]
    assert isinstance(block["self_attn"]["qkv_proj"]["kernel"], ConcatArray)
    assert isinstance(block["mlp"]["gate_up_proj"]["kernel"], LutArray)


def test_tied_projections_with_steps_for_blocks_of_columns_stay_apart():
    double_quant = lutjax.DoubleQuant(block=16)
    weight = jax.random.normal(jax.random.key(0), (64, 32))
    tied = lutjax.quantize({"kernel": weight}, bits=4, group_size=32, double_quant=double_quant)
    fused = lutjax.fuse_projections(dict.fromkeys(("q_proj", "k_proj", "v_proj"), tied))
    (joined,) = jax.tree.leaves(fused, is_leaf=lutjax.is_compressed)
    expected = jnp.tile(tied["kernel"].materialize(), (1, 3))
    np.testing.assert_array_equal(joined.materialize(), expected)


def test_checkpoints_have_the_projections_themselves(tmp_path):
    fused = lutjax.fuse_projections(lutjax.quantize(parameters(CONFIG), bits=4, group_size=16))
    with pytest.raises(ValueError, match=r"gate_up_proj.*before lutjax\.fuse_projections"):
        lutjax.save(tmp_path / "fused", fused, CONFIG)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_projections():
    params = parameters(CONFIG)
    with pytest.raises(
        ValueError, match=r"nothing to join: .* q_proj, k_proj, v_proj or gate_proj"
    ):
        lutjax.fuse_projections({"head": params["norm"], "mlp": {"up_proj": jnp.ones(3)}})
    fused = lutjax.fuse_projections(params)
    again = lutjax.fuse_projections(fused)
    assert jax.tree.structure(again) == jax.tree.structure(fused)
    block = params["layers"]["0"]["self_attn"]
    block["k_proj"] = {"kernel": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match="layers/0/self_attn/q_proj, k_proj, v_proj"):
        lutjax.fuse_projections(lutjax.quantize(params, bits=4, group_size=16))
    del block["k_proj"]["kernel"]
    with pytest.raises(ValueError, match="they differ in what they have"):
        lutjax.fuse_projections(params)
