"""gpt-oss: its MXFP4 experts, its configurations and how it is compressed further."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILIES_OF_EXPERTS, hf_tensors, random_values, write_hf
from safetensors.numpy import load_file, save_file

import lutjax
from lutjax.adapters import lora
from lutjax.calibrate import quantize_decoder
from lutjax.io import load, open_checkpoint
from lutjax.io.configs import config_from_hf, config_to_hf
from lutjax.io.grid import abstract_grid_array, grid_array
from lutjax.models import Decoder, RopeScaling, stack_layers
from lutjax.models.rope import rope_frequencies, rope_scale

DATA = Path(__file__).parents[2] / "data" / "gpt_oss"
OUTPUTS = np.load(DATA / "outputs.npz")

# config.json of openai/gpt-oss-20b, without what says nothing of the computation.
PUBLISHED = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_mxfp4_is_kept_bit_for_bit():
    """The expected values are what transformers dequantises."""
    checkpoint = open_checkpoint(DATA / "mxfp4")
    both = OUTPUTS["mxfp4.gate_up_proj"]
    for name, expected in (("gate_proj", both[..., ::2]), ("up_proj", both[..., 1::2])):
        path = f"layers/0/mlp/experts/{name}/kernel"
        array = grid_array(checkpoint, path)
        np.testing.assert_array_equal(array.materialize(), expected)
        np.testing.assert_array_equal(checkpoint.read(path), expected)
        assert (array.bits, array.group_size, array.scales.dtype) == (4, 32, jnp.bfloat16)
        assert jax.eval_shape(lambda path=path: grid_array(checkpoint, path)) == (
            abstract_grid_array(checkpoint, path)
        )


def test_kept_weights_compute_what_transformers_does_in_a_lifted_function():
    model, params, _ = load(DATA / "mxfp4", keep_quantized=True)
    logits = jax.jit(lutjax.lift(model.apply, strict=True))({"params": params}, OUTPUTS["tokens"])
    # float32 on both sides, logits of up to 16.
    np.testing.assert_allclose(logits, OUTPUTS["mxfp4.logits"], rtol=1e-4, atol=2e-4)
    kept = [path for path, leaf in lutjax.paths.named_leaves(params) if lutjax.is_compressed(leaf)]
    assert len(kept) == 6 and all("/mlp/experts/" in path for path in kept)


def test_kept_weights_are_saved_and_read_back(tmp_path):
    model, params, _ = load(DATA / "mxfp4", keep_quantized=True)
    lutjax.save(tmp_path / "saved", params, config=model.config)
    again, read, _ = load(tmp_path / "saved")
    assert again.config == model.config
    for path, leaf in lutjax.paths.named_leaves(params):
        found = dict(lutjax.paths.named_leaves(read))[path]
        for expected, actual in zip(jax.tree.leaves(leaf), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(expected, actual)


def test_scanned_layers_compute_the_same():
    model, params, _ = load(DATA / "dense")
    model = Decoder(dataclasses.replace(model.config, scan_layers=True))
    logits = jax.jit(model.apply)({"params": stack_layers(params)}, OUTPUTS["tokens"])
    np.testing.assert_allclose(logits, OUTPUTS["dense.logits"], rtol=1e-4, atol=2e-4)


def test_error_feedback_reaches_attention_and_experts():
    model, params, _ = load(DATA / "dense")
    recipe = lutjax.Recipe.uniform(bits=4, group_size=32)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (8, 32), np.int32)
    rounded = quantize_decoder(model.config, params, tokens, recipe)
    nearest = lutjax.quantize(params, recipe)
    compressed = {
        path for path, leaf in lutjax.paths.named_leaves(rounded) if lutjax.is_compressed(leaf)
    }
    assert len(compressed) == 14
    assert all(path.endswith("_proj/kernel") for path in compressed)

    apply = jax.jit(lutjax.lift(model.apply))
    wanted = apply({"params": params}, tokens)

    def error(params):
        return float(jnp.linalg.norm(apply({"params": params}, tokens) - wanted))

    assert error(rounded) < 0.9 * error(nearest)


def test_only_matrices_are_compressed_and_adapted():
    _, params, _ = load(DATA / "dense")
    stacked = {**params, "layers": stack_layers(params)["layers"]}
    for tree in (params, stacked):
        compressed = lutjax.quantize(tree, bits=4, group_size=32)
        found = {
            path
            for path, leaf in lutjax.paths.named_leaves(compressed)
            if lutjax.is_compressed(leaf)
        }
        assert found and all(path.endswith("_proj/kernel") for path in found)
        adapter = lora.init(tree, 2, jax.random.key(0), targets=("*self_attn*", "*experts*"))
        assert all(path.endswith("_proj/kernel") for path in adapter)


def test_halves_of_a_tensor_hold_no_more_than_themselves():
    checkpoint = open_checkpoint(DATA / "dense")
    gate = checkpoint.read("layers/0/mlp/experts/gate_proj/kernel")
    assert gate.base is None or gate.base.nbytes == gate.nbytes
    assert gate.shape == (4, 64, 32)


def test_the_published_configuration():
    config = config_from_hf(PUBLISHED)
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (32, 4, True)
    assert config.sliding_layers == (True, False) * 12
    assert (config.qkv_bias, config.o_bias, config.expert_bias) == (True, True, True)
    assert (config.attention_sinks, config.swiglu_limit) == (True, 7.0)
    assert config_from_hf(config_to_hf(config)) == config
    said = ("layer_types", "rope_scaling", "rope_theta", "sliding_window", "swiglu_limit")
    least = {key: PUBLISHED[key] for key in PUBLISHED if key not in said}
    assert config_from_hf(least) == config  # what GptOssConfig takes
    assert config_from_hf(PUBLISHED | {"rope_scaling": None}) == config
    plain = config_from_hf(PUBLISHED | {"rope_scaling": {"rope_type": "default"}})
    assert plain.rope_scaling is None
    assert config_from_hf(config_to_hf(plain)) == plain
    everywhere = config_from_hf(PUBLISHED | {"sliding_window": None})
    assert (everywhere.sliding_window, everywhere.sliding_layers) == (None, None)


@pytest.mark.parametrize(("key", "truncate"), [("whole", True), ("gpt_oss", False)])
def test_yarn_is_that_of_transformers(key, truncate):
    config = config_from_hf(PUBLISHED)
    assert config.rope_scaling is not None
    scaling = dataclasses.replace(config.rope_scaling, truncate=truncate)
    config = dataclasses.replace(config, rope_scaling=scaling)
    # transformers computes them in float32.
    np.testing.assert_allclose(rope_frequencies(config), OUTPUTS[f"yarn.{key}"], rtol=1e-6)
    assert rope_scale(config) == pytest.approx(float(OUTPUTS["yarn.scale"]), rel=1e-12)


def test_yarn_of_other_families():
    """As Qwen's model cards write it."""
    data = PUBLISHED | {
        "model_type": "qwen3",
        "attention_bias": False,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    }
    expected = RopeScaling("yarn", 4.0, 1.0, 32.0, 32768, attention_factor=0.1 * np.log(4) + 1)
    assert config_from_hf(data).rope_scaling == expected
    data["rope_scaling"] = data["rope_scaling"] | {"attention_factor": 1.0, "beta_fast": None}
    assert config_from_hf(data).rope_scaling == dataclasses.replace(expected, attention_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 is not supported"),
        ({"swiglu_limit": None}, "'swiglu_limit' is None, not a positive number"),
        ({"attention_bias": False}, "attention_bias=False is not supported for 'gpt_oss'"),
        ({"num_local_experts": 0}, "'num_local_experts' is 0"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types has 'chunked_attention'"),
    ],
)
def test_unsupported_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(PUBLISHED | change)


def test_other_quantisation_is_refused(tmp_path, tiny_config):
    config = dataclasses.replace(tiny_config, **FAMILIES_OF_EXPERTS["gpt_oss"])
    write_hf(tmp_path, config, hf_tensors(random_values(config), "gpt_oss"))
    data = json.loads((tmp_path / "config.json").read_text())
    data["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="'gpt_oss' quantised by 'bitsandbytes'; supported is mxf"):
        open_checkpoint(tmp_path)


BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = BLOCKS.replace("blocks", "scales")
GATES = "model.layers.0.mlp.experts.gate_up_proj_bias"
DENSE = BLOCKS.replace("_blocks", "")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (SCALES, None, rf"'{SCALES}' is missing"),
        (BLOCKS, None, rf"'{BLOCKS}' is missing beside '{SCALES}'"),
        (DENSE, np.zeros((4, 32, 64), np.float32), "is there beside .*, which is the same"),
        ("model.layers.1.mlp.router.bias", None, r"'model\.layers\.1\.mlp\.router\.bias' is mis"),
        (BLOCKS, np.zeros((4, 64, 16), np.uint8), rf"'{BLOCKS}' has shape \[4, 64, 16\], of the"),
        (BLOCKS, np.zeros((4, 64, 1, 8), np.uint8), rf"'{BLOCKS}' of dtype U8 .* end with 16"),
        (BLOCKS, np.zeros((4, 64, 1, 16), np.int8), rf"'{BLOCKS}' of dtype I8 .* must be of U8"),
        (SCALES, np.zeros((4, 32, 1), np.uint8), rf"'{SCALES}' .* must .* shape \[4, 64, 1\]"),
        (BLOCKS.replace("blocks", "bias"), np.zeros(4, np.float32), r"has shape \[4\], of the"),
        (
            GATES,
            np.zeros((4, 60), np.float32),
            rf"\.gate_proj\.bias' \(stored in '{GATES}'\) has shape \[4, 30\]",
        ),
        ("model.layers.1.mlp.experts.9.up", np.zeros(4, np.float32), "has no place in a 'gpt_oss'"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, tensor, message):
    tensors = load_file(DATA / "mxfp4" / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DATA / "mxfp4" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_scales_that_are_not_finite(tmp_path):
    tensors = load_file(DATA / "mxfp4" / "model.safetensors")
    tensors[SCALES][0, 0, 0] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DATA / "mxfp4" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="has a scale, an offset or a table that is not finite"):
        load(tmp_path, keep_quantized=True)
    with pytest.raises(ValueError, match="holds 32 NaN or infinite values"):
        load(tmp_path)
