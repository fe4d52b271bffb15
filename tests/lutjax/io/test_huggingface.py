from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    FAMILIES_OF_EXPERTS,
    FAMILIES_OF_GEMMA,
    hf_tensors,
    random_values,
    write_hf,
)
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import assert_same_bits, tiny_tokenizer

from lutjax.io import load, load_params, open_checkpoint, save
from lutjax.io.configs import SUPPORTED, config_from_hf, config_to_hf
from lutjax.models import Decoder, RopeScaling, generate

FAMILIES = {
    "llama": {},
    "llama3": {
        "tie_embeddings": True,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    },
    "linear": {"rope_scaling": RopeScaling("linear", factor=2.0)},
    "factors": {"rope_scaling": RopeScaling("factors", factors=(1.0, 2.0, 8.0))},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen2-window": {"model_type": "qwen2", "qkv_bias": True, "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "tie_embeddings": True},
    **FAMILIES_OF_GEMMA,
    **FAMILIES_OF_EXPERTS,
}
DATA = Path(__file__).parents[2] / "data" / "gemma"
MIXTURES = DATA.parent / "mixtures"
GPT_OSS = DATA.parent / "gpt_oss"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_family_is_read_back_exactly(tmp_path, tiny_config, family, shards):
    config = dataclasses.replace(tiny_config, **FAMILIES[family])
    values = random_values(config)
    write_hf(tmp_path / "m", config, hf_tensors(values, family), shards)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == config
    assert {path: value.shape for path, value in values.items()} == dict(checkpoint.shapes)
    for path, value in checkpoint.parameters():
        np.testing.assert_array_equal(value, values[path])


def test_load_gives_a_model_that_runs(hf_directory, tiny_config):
    model, params, tokenizer = load(hf_directory)
    assert model.config == tiny_config
    assert tokenizer is None
    logits = jax.jit(model.apply)({"params": params}, jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, tiny_config.vocab_size)


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes(tmp_path, tiny_config, stored, wanted):
    values = {path: value.astype(stored) for path, value in random_values(tiny_config).items()}
    write_hf(tmp_path / "m", tiny_config, hf_tensors(values))
    params = load_params(open_checkpoint(tmp_path / "m"), wanted)
    kernel = params["layers"]["1"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == wanted
    expected = values["layers/1/mlp/up_proj/kernel"].astype(wanted)
    np.testing.assert_array_equal(np.asarray(kernel), expected)


def test_hugging_face_defaults():
    data = {
        "model_type": "llama",
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = config_from_hf(data)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 4, 1e-6)
    assert (config.rope_theta, config.tie_embeddings) == (10000.0, False)
    null = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_scaling", "sliding_window"))
    assert config_from_hf(data | null) == config
    # transformers 5 writes the base into rope_parameters.
    newer = data | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert config_from_hf(newer).rope_theta == 1e6
    window = {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": None}
    assert config_from_hf(data | {"model_type": "qwen2"} | window).sliding_window is None


@pytest.mark.parametrize(
    ("data", "family"),
    [
        *((DATA, family) for family in ("gemma", "gemma2", "gemma3")),
        *((MIXTURES, family) for family in ("mixtral", "qwen3_moe")),
        *((GPT_OSS, stored) for stored in ("dense", "mxfp4")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_computes_what_transformers_does(data, family):
    outputs = np.load(data / "outputs.npz")
    model, params, _ = load(data / family)
    tokens = outputs["tokens"]
    logits = jax.jit(model.apply)({"params": params}, tokens)
    # float32 on both sides, logits of up to 18, weights of order 1 in up to seven layers; no expert
    # is chosen by less than 1e-3.
    np.testing.assert_allclose(logits, outputs[f"{family}.logits"], rtol=1e-4, atol=2e-4)
    found = generate(
        model.apply, params, tokens[:, :9].tolist(), config=model.config, max_new_tokens=16
    )
    assert found == outputs[f"{family}.greedy"].tolist()


def test_weights_of_experts_that_do_not_add_up_to_1():
    outputs = np.load(MIXTURES / "outputs.npz")
    model, params, _ = load(MIXTURES / "qwen3_moe")
    model = Decoder(dataclasses.replace(model.config, norm_topk_prob=False))
    logits = jax.jit(model.apply)({"params": params}, outputs["tokens"])
    expected = outputs["qwen3_moe_unnormalised.logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - outputs["qwen3_moe.logits"]).max() > 1


def test_configurations_of_mixtures():
    data = json.loads((MIXTURES / "qwen3_moe" / "config.json").read_text())
    config = config_from_hf(data)
    assert (config.num_experts, config.num_experts_per_tok) == (6, 2)
    assert (config.intermediate_size, config.norm_topk_prob) == (24, True)
    older = {key: data[key] for key in data if key != "num_local_experts"} | {"num_experts": 6}
    assert config_from_hf(older) == config
    assert config_from_hf(older | {"num_local_experts": None}) == config
    least = {key: older[key] for key in older if key not in ("norm_topk_prob", "num_experts")}
    assert config_from_hf(least).num_experts == 128  # what Qwen3MoeConfig takes
    assert not config_from_hf(least).norm_topk_prob
    windowed = data | {"use_sliding_window": True, "sliding_window": 7}
    assert config_from_hf(windowed).sliding_window == 7
    for change in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ValueError, match="leave some layers without experts"):
            config_from_hf(data | change)
    with pytest.raises(ValueError, match="num_experts_per_tok=7 must be from 1 to num_experts=6"):
        config_from_hf(data | {"num_experts_per_tok": 7})
    data = json.loads((MIXTURES / "mixtral" / "config.json").read_text())
    least = {key: data[key] for key in data if "experts" not in key and key != "rope_parameters"}
    config = config_from_hf(least)
    assert (config.num_experts, config.num_experts_per_tok, config.rope_theta) == (8, 2, 1e6)


def test_experts_that_are_missing_or_unlike_the_others(tmp_path, tiny_config):
    config = dataclasses.replace(tiny_config, **FAMILIES_OF_EXPERTS["qwen3_moe"])
    tensors = hf_tensors(random_values(config))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    changes = {
        "the tensor of expert 2 is missing beside 'model.layers.1.mlp.experts.0.up_proj": {},
        r"experts.2.up_proj.weight' of type F32 and shape \[1, 2\] is not stored as": {
            name: np.zeros((1, 2), np.float32)
        },
        "'model.layers.1.mlp.experts.3.up_proj.weight' has no place among 3 experts": {
            name: tensors[name],
            name.replace("experts.2", "experts.3"): tensors[name],
        },
        "of type F16 and shape .* is not stored as": {name: tensors[name].astype(np.float16)},
    }
    del tensors[name]
    for i, (message, change) in enumerate(changes.items()):
        write_hf(tmp_path / str(i), config, tensors | change)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(tmp_path / str(i))


def older_config() -> dict:
    """The configuration of the Gemma 3 fixture as transformers 4 wrote it."""
    data = json.loads((DATA / "gemma3" / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del data[key]
    return data | {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }


def test_older_configurations_of_gemma_mean_the_same():
    config = open_checkpoint(DATA / "gemma3").config
    assert config.sliding_layers == (True,) * 5 + (False, True)
    assert (config.sliding_rope_theta, config.rope_theta) == (1e4, 1e6)
    assert config_from_hf(older_config()) == config
    everywhere = config_from_hf(older_config() | {"sliding_window": None})
    assert (everywhere.sliding_layers, everywhere.sliding_rope_theta) == (None, None)
    # Google's first Gemma says "gelu" for its approximation.
    first = json.loads((DATA / "gemma" / "config.json").read_text()) | {"hidden_act": "gelu"}
    assert config_from_hf(first) == open_checkpoint(DATA / "gemma").config


def test_gemma_defaults():
    """config.json of google/gemma-3-4b-it leaves most of the text model to transformers."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (config.vocab_size, config.head_dim, config.tie_embeddings) == (262208, 256, True)
    assert (config.num_heads, config.num_kv_heads) == (8, 4)
    assert (config.rope_theta, config.sliding_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling("linear", factor=8.0)
    assert config.query_pre_attn_scalar is None  # that of head_dim
    assert [i for i, window in enumerate(config.windowed) if not window] == [5, 11, 17, 23, 29]
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    second = config_from_hf({"model_type": "gemma2", "num_attention_heads": 2, **sizes})
    assert (second.attn_logit_softcapping, second.final_logit_softcapping) == (50.0, 30.0)
    assert (second.sliding_window, second.sliding_layers) == (4096, (True, False, True))


def test_the_text_model_of_a_multimodal_directory(tmp_path):
    shutil.copytree(DATA / "gemma3", tmp_path / "m")
    text = json.loads((tmp_path / "m" / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(whole))

    tensors = load_file(tmp_path / "m" / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["vision_tower.embeddings.patch_embedding.bias"] = np.zeros(3, np.float32)
    save_file(renamed, tmp_path / "m" / "model.safetensors")
    checkpoint, expected = open_checkpoint(tmp_path / "m"), open_checkpoint(DATA / "gemma3")
    assert checkpoint.config == expected.config
    for path, value in expected.parameters():
        np.testing.assert_array_equal(checkpoint.read(path), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types has 'chunked_attention'"),
        ({"layer_types": ["full_attention"]}, "sliding_layers has 1 entries"),
        (
            {"layer_types": None, "sliding_window_pattern": 0},
            "'sliding_window_pattern' is 0, not an int",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "RoPE scaling 'linear' in layers with a sliding window",
        ),
        ({"model_type": "gemma3", "text_config": None}, "'text_config' is None"),
        ({"rope_parameters": None, "rope_local_base_freq": 0}, "'rope_local_base_freq' is 0"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": None}}},
            "'rope_theta' is None, not a positive number",
        ),
        ({"model_type": "gemma3n"}, "'gemma3n'; supported are"),
    ],
)
def test_unsupported_configurations_of_gemma(change, message):
    data = json.loads((DATA / "gemma3" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        config_from_hf(data | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba'; supported are " + ", ".join(SUPPORTED)),
        ({"model_type": None}, "supported are"),
        ({"hidden_size": None}, "'hidden_size' is None"),
        ({"hidden_size": "576"}, "'hidden_size' is '576'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "'original_max_position_embeddings' is None",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "beta_fast": 1,
                }
            },
            "has a beta_slow that is not below its beta_fast",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}},
            "has mscale and mscale_all_dim, which are not supported",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'low_freq_factor' is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "'factor' is None, not a pos"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor' is 0, not a positive"),
        ({"rope_scaling": {"factor": 4.0}}, "does not name its 'rope_type'"),
        ({"rope_scaling": "linear"}, "'rope_scaling' is 'linear', not a JSON object"),
        ({"rope_parameters": {"rope_theta": None}}, "'rope_theta' is None, not a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "leaves a part of each head as it is",
        ),
        ({"rope_theta": None}, "'rope_theta' is None, not a positive number"),
        ({"rope_theta": -1.0}, r"'rope_theta' is -1\.0"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is None"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is '1e-5'"),
        ({"num_attention_heads": 0}, "'num_attention_heads' is 0, not an integer of at least 1"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0"),
        ({"max_position_embeddings": None}, "'max_position_embeddings' is None"),
        ({"head_dim": -4}, "'head_dim' is -4"),
        ({"model_type": "mistral", "sliding_window": 0}, "'sliding_window' is 0"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4,
                "use_sliding_window": True,
                "max_window_layers": None,
            },
            "'max_window_layers' is None, not an integer of at least 0",
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 4,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            "max_window_layers=1",
        ),
    ],
)
def test_unsupported_configurations(tiny_config, change, message):
    with pytest.raises(ValueError, match=rf"^a/config\.json.*{message}"):
        config_from_hf(config_to_hf(tiny_config) | change, "a/config.json")


def test_heads_that_do_not_fit_each_other(tiny_config):
    with pytest.raises(ValueError, match="num_kv_heads=3 does not divide num_heads=4"):
        config_from_hf(config_to_hf(tiny_config) | {"num_key_value_heads": 3})


def test_a_configuration_of_no_known_family_is_not_written(tiny_config):
    with pytest.raises(ValueError, match="the configuration has the architecture 'mamba'"):
        config_to_hf(dataclasses.replace(tiny_config, model_type="mamba"))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), f"tensor '{UP}' is missing"),
        (lambda t: t.update({UP: t[UP].T.copy()}), rf"'{UP}' has shape \[20, 28\].*\[28, 20\]"),
        (lambda t: t.update({UP: t[UP].astype(np.int32)}), f"'{UP}' has dtype I32"),
        (lambda t: t.update({"model.extra": t[UP]}), "'model.extra' has no place"),
        (
            lambda t: t.update({UP.replace("weight", "bias"): np.zeros(28, np.float32)}),
            "up_proj.bias' has no place",
        ),
    ],
)
def test_wrong_tensors_are_named_before_reading(hf_directory, edit, message):
    edit_tensors(hf_directory, edit)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(hf_directory)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_named(hf_directory, bad):
    def edit(tensors):
        tensors[UP][3, 4] = bad

    edit_tensors(hf_directory, edit)
    with pytest.raises(ValueError, match=f"'{UP}'.*holds 1 NaN or infinite"):
        load(hf_directory)
    _, params, _ = load(hf_directory, allow_nonfinite=True)
    kernel = np.asarray(params["layers"]["1"]["mlp"]["up_proj"]["kernel"])
    np.testing.assert_equal(kernel[4, 3], np.float32(bad))


def test_tensors_that_say_nothing_are_ignored(hf_directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(hf_directory, lambda t: t.update({name: np.ones(3, np.float32)}))
    assert not any("inv_freq" in path for path in open_checkpoint(hf_directory).shapes)


def test_a_tied_embedding_that_is_stored_as_the_head(tmp_path, tiny_config):
    config = dataclasses.replace(tiny_config, tie_embeddings=True)
    values = random_values(config)
    tensors = hf_tensors(values)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_hf(tmp_path / "m", config, tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    for path, value in checkpoint.parameters():
        np.testing.assert_array_equal(value, values[path], err_msg=path)
    write_hf(tmp_path / "m", tiny_config, tensors)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is missing"):
        open_checkpoint(tmp_path / "m")


def test_truncated_file(hf_directory):
    path = hf_directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        open_checkpoint(hf_directory)


@pytest.mark.parametrize("cut", [0, 4, 8, 20])
def test_truncated_header(hf_directory, cut):
    path = hf_directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(hf_directory)


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((2**63).to_bytes(8, "little") + b"{}", "claims a header of 9223372036854775808"),
        ((2).to_bytes(8, "little") + b"{]", "not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        (header({"w": {"dtype": "F32"}}), "describes tensor 'w'"),
        (header({"w": 3}), "describes tensor 'w'"),
        (
            header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "ends at .*truncated",
        ),
        (
            header({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
            "does not fit its data_offsets",
        ),
        (
            header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}) + bytes(8),
            "does not fit its data_offsets",
        ),
        (
            header({"w": {"dtype": "F6", "shape": [1], "data_offsets": [0, 1]}}) + bytes(8),
            "unsupported dtype 'F6'",
        ),
    ],
)
def test_unsound_headers(hf_directory, content, message):
    (hf_directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(hf_directory)


@pytest.fixture
def sharded(tmp_path, tiny_config):
    write_hf(tmp_path / "sharded", tiny_config, hf_tensors(random_values(tiny_config)), shards=2)
    return tmp_path / "sharded"


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors, which is"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: "../model.safetensors"}, "not a file name"),
        ({UP: 3}, "not a file name"),
        ({"model.ghost": "model-00001-of-00002.safetensors"}, "'model.ghost', but it does not"),
    ],
)
def test_unsound_index(sharded, change, message):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(sharded)


def test_the_single_file_goes_before_an_index(sharded, tiny_config):
    values = random_values(tiny_config)
    newer = hf_tensors({path: value + 1 for path, value in values.items()})
    save_file(newer, sharded / "model.safetensors")
    for path, value in open_checkpoint(sharded).parameters():
        np.testing.assert_array_equal(value, values[path] + 1)


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        open_checkpoint(sharded)


def test_missing_files(tmp_path, hf_directory):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf does not exist"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "a" / "b" / "c")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (hf_directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        open_checkpoint(hf_directory)


def test_pickles_are_refused(hf_directory):
    pickled = hf_directory / "pytorch_model.bin"
    (hf_directory / "model.safetensors").rename(pickled)
    for path in (hf_directory, pickled):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickled checkpoint"):
            open_checkpoint(path)


def test_unknown_kind_of_file(hf_directory):
    with pytest.raises(ValueError, match="name the directory"):
        open_checkpoint(hf_directory / "model.safetensors")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A repository with a folder of its own, and the cache that it is downloaded to."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository, cache = tmp_path / "repository", tmp_path / "cache"

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == "someone/some-model"
        files = [str(f.relative_to(repository)) for f in repository.rglob("*") if f.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository, cache


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_is_read_is_downloaded(hub, tiny_config, shards):
    repository, cache = hub
    write_hf(repository, tiny_config, hf_tensors(random_values(tiny_config)), shards)
    tiny_tokenizer(tiny_config.vocab_size).save(repository)
    read = {str(path.relative_to(repository)) for path in repository.iterdir()}
    others = (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "pytorch_model.bin",
        "vocab.json",
        "README.md",
    )
    for name in others:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    model, params, tokenizer = load("someone/some-model")
    assert model.config == tiny_config
    assert tokenizer.encode("cab") == [2, 0, 1]
    assert params["norm"]["scale"].shape == (tiny_config.hidden_size,)
    assert {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()} == read


def test_a_saved_model_is_downloaded(hub, hf_directory, tiny_config):
    _, params, _ = load(hf_directory)
    save(hub[0], params, tiny_config, max_shard_bytes=4000)
    assert len(list(hub[0].glob("*.safetensors"))) > 1
    _, found, _ = load("someone/some-model")
    assert_same_bits(found, params)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def snapshot_download(repo_id, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"'someone/some-model' is neither.*no network"):
        open_checkpoint("someone/some-model")


@pytest.mark.outside
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "factors"])
def test_transformers_computes_the_same(tmp_path, tiny_config, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(tiny_config, **FAMILIES[family])
    values = {path: 0.3 * value for path, value in random_values(config).items()}
    write_hf(tmp_path / "m", config, hf_tensors(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model, params, _ = load(tmp_path / "m")
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    # float32 on both sides, sums of at most 28 terms.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
