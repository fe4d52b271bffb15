"""Checkpoints of GPTQ, AWQ, bitsandbytes and compressed-tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import FAMILIES_OF_EXPERTS, hf_tensors, random_values, write_hf
from quantized_checkpoints import CASES, write_quantized, write_tensors
from tiny_checkpoint import assert_same_bits, tiny_tokenizer

import lutjax
from lutjax import LutArray
from lutjax.arrays import ReorderedArray
from lutjax.cli import main
from lutjax.io import compress_checkpoint, open_checkpoint
from lutjax.io.blocks import integer_blocks
from lutjax.io.grid import abstract_grid_array, grid_array, has_grid
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.io.quantized import QuantizedReader, method_from_config
from lutjax.io.safetensors import SafetensorsReader
from lutjax.models import DecoderConfig

DATA = Path(__file__).parents[2] / "data"
UP = "layers/1/mlp/up_proj/kernel"
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def config() -> DecoderConfig:
    """Groups of 32 divide the rows, and blocks of 64 do not divide all."""
    return DecoderConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )


# Against what the packages compute (tests/data)


def outside(tmp_path, file, case, quantization) -> tuple[np.ndarray, np.ndarray]:
    """A layer of a fixture as it is read, and what the package dequantised it to."""
    arrays = np.load(DATA / file)
    prefix = f"{case}."
    tensors = {n.removeprefix(prefix): arrays[n] for n in arrays.files if n.startswith(prefix)}
    dense = tensors.pop("dense")
    views = {np.dtype(np.uint16): ml_dtypes.bfloat16}
    tensors = {
        f"layer.{name.removesuffix('@F8')}": value.view(
            ml_dtypes.float8_e4m3fn if name.endswith("@F8") else views.get(value.dtype, value.dtype)
        )
        for name, value in tensors.items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "layer.safetensors")
    method = method_from_config(quantization, "config.json")
    reader = QuantizedReader(SafetensorsReader.open_file(tmp_path / "layer.safetensors"), method)
    assert list(reader.infos) == ["layer.weight"]
    assert reader.infos["layer.weight"].shape == dense.shape
    return reader.read("layer.weight"), dense


GPTQ = [
    (2, False, 32, False),
    (3, False, 32, False),
    (3, True, 32, False),
    (4, True, 32, False),
    (4, False, 32, False),
    (8, False, -1, False),
    (4, True, -1, False),
    (4, False, 32, True),
    (4, True, 32, True),
]


@pytest.mark.parametrize(("bits", "sym", "group", "act"), GPTQ)
def test_autogptq(tmp_path, bits, sym, group, act):
    case = f"gptq_{bits}_{'sym' if sym else 'asym'}_{group}{'_act' if act else ''}"
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
    found, dense = outside(tmp_path, "autogptq/layers.npz", case, quantization | {"desc_act": act})
    np.testing.assert_array_equal(found, dense)


@pytest.mark.parametrize("group", [32, 64])
def test_autoawq(tmp_path, group):
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    found, dense = outside(tmp_path, "autoawq/layers.npz", f"awq_{group}", quantization)
    np.testing.assert_array_equal(found, dense)


@pytest.mark.parametrize("case", ["nf4", "nf4_double", "fp4", "fp4_double"])
def test_bitsandbytes(tmp_path, case):
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found, dense = outside(tmp_path, "bitsandbytes/layers.npz", case, quantization)
    np.testing.assert_array_equal(found, dense)


@pytest.mark.parametrize(
    ("bits", "sym", "group"), [(4, True, 32), (4, False, 32), (4, True, None), (8, True, None)]
)
def test_compressed_tensors(tmp_path, bits, sym, group):
    strategy = "group" if group else "channel"
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy}
    scheme = {"weights": weights | {"group_size": group}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    case = f"ct_{bits}_{'sym' if sym else 'asym'}_{strategy}"
    found, dense = outside(
        tmp_path,
        "compressed_tensors/layers.npz",
        case,
        quantization | {"config_groups": {"group_0": scheme}},
    )
    np.testing.assert_array_equal(found, dense)


FLOATS = {
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
    "int8_channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "group_size": 32}),
}


@pytest.mark.parametrize("case", FLOATS)
def test_compressed_floats(tmp_path, case):
    kind, weights = FLOATS[case]
    quantization = {"quant_method": "compressed-tensors", "format": kind}
    quantization["config_groups"] = {"group_0": {"weights": weights}}
    found, dense = outside(tmp_path, "compressed_tensors/floats.npz", case, quantization)
    if case == "nvfp4":  # where the factor is part of the table instead of the scales
        np.testing.assert_allclose(found, dense, rtol=2.0**-22)
    else:
        np.testing.assert_array_equal(found, dense)


# Whole directories


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_exact(tmp_path, config, name):
    """Equality with float64: neither the products nor the sums round."""
    _, expected = write_quantized(tmp_path / "m", config, CASES[name])
    checkpoint = open_checkpoint(tmp_path / "m")
    for path, value in checkpoint.parameters():
        stored = expected[checkpoint_name(path, "hf")]
        exact = stored.T if is_transposed(path) else stored
        np.testing.assert_array_equal(value.astype(np.float64), exact, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_kept_layers_stand_for_the_same_values(tmp_path, config, name):
    write_quantized(tmp_path / "m", config, CASES[name])
    _, dense, _ = lutjax.load(tmp_path / "m")
    _, kept, _ = lutjax.load(tmp_path / "m", keep_quantized=True)
    assert_same_bits(lutjax.materialize(kept), dense)
    leaves = {path: w for path, w in lutjax.paths.named_leaves(kept) if lutjax.is_compressed(w)}
    assert len(leaves) == 13
    assert "layers/0/mlp/down_proj/kernel" not in leaves
    checkpoint = open_checkpoint(tmp_path / "m")
    for path in checkpoint.shapes:
        assert has_grid(checkpoint, path) == (path in leaves)
    found = jax.eval_shape(lambda: grid_array(checkpoint, UP))
    assert found == abstract_grid_array(checkpoint, UP)
    array = leaves[UP]
    assert isinstance(array, ReorderedArray) == CASES[name].reordered
    if isinstance(array, ReorderedArray):
        array = array.base
        assert leaves[UP].nbytes == array.nbytes + 4 * 64
    assert isinstance(array, LutArray)
    size = 8 * (array.nbytes - array.lut.nbytes) / (64 * 96)
    assert size == CASES[name].bits_per_weight


@pytest.mark.parametrize(
    "name",
    [
        "gptq-4",
        "gptq-4-act",
        "gptq-3-sym-column",
        "awq",
        "nf4",
        "compressed-4-asym",
        "compressed-int8",
        "fp8",
        "modelopt-nvfp4",
    ],
)
def test_kept_layers_compute_the_same(tmp_path, config, name):
    write_quantized(tmp_path / "m", config, CASES[name])
    model, dense, _ = lutjax.load(tmp_path / "m")
    _, kept, _ = lutjax.load(tmp_path / "m", keep_quantized=True)
    tokens = jnp.arange(8).reshape(1, 8)
    expected = jax.jit(model.apply)({"params": dense}, tokens)
    logits = jax.jit(lutjax.lift(model.apply, strict=True))({"params": kept}, tokens)
    # float32 sums in another order, through two layers.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name",
    [
        "gptq-4-act",
        "gptq-3-sym-column",
        "awq",
        "compressed-4-asym",
        "nf4",  # with a random table in each
        "modelopt-nvfp4",
        "fp8",
    ],
)
def test_experts_stay_quantised(tmp_path, config, name):
    config = dataclasses.replace(config, **FAMILIES_OF_EXPERTS["qwen3_moe"])
    _, expected = write_quantized(tmp_path / "m", config, CASES[name])
    model, dense, _ = lutjax.load(tmp_path / "m")
    _, kept, _ = lutjax.load(tmp_path / "m", keep_quantized=True)
    assert_same_bits(lutjax.materialize(kept), dense)
    up = kept["layers"]["1"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert lutjax.is_compressed(up) and up.shape == (3, 64, 96)
    for i in range(3):
        exact = expected[f"model.layers.1.mlp.experts.{i}.up_proj.weight"].T
        np.testing.assert_array_equal(np.asarray(up.materialize()[i], np.float64), exact)
    checkpoint = open_checkpoint(tmp_path / "m")
    path = "layers/1/mlp/experts/up_proj/kernel"
    assert jax.eval_shape(lambda: grid_array(checkpoint, path)) == abstract_grid_array(
        checkpoint, path
    )
    tokens = jnp.arange(8).reshape(1, 8)
    logits = jax.jit(lutjax.lift(model.apply, strict=True))({"params": kept}, tokens)
    dense_logits = jax.jit(model.apply)({"params": dense}, tokens)
    # float32 sums in another order, through two layers.
    np.testing.assert_allclose(
        logits, dense_logits, rtol=1e-4, atol=1e-4 * np.abs(dense_logits).max()
    )
    compress_checkpoint(tmp_path / "m", tmp_path / "out", keep_quantized=True)
    _, found, _ = lutjax.load(tmp_path / "out")
    assert_same_bits(found["layers"]["1"]["mlp"]["experts"], kept["layers"]["1"]["mlp"]["experts"])


@pytest.mark.parametrize(
    "name", ["gptq-3", "gptq-4-act", "awq", "nf4-double", "compressed-4", "fp8", "compressed-nvfp4"]
)
def test_compressing_keeps_them(tmp_path, config, name):
    write_quantized(tmp_path / "m", config, CASES[name])
    _, kept, _ = lutjax.load(tmp_path / "m", keep_quantized=True)
    rule = lutjax.Rule("*/down_proj/kernel", lutjax.LutConfig(group_size=32))
    recipe = lutjax.Recipe((rule,))
    compress_checkpoint(tmp_path / "m", tmp_path / "out", recipe, keep_quantized=True)
    _, found, _ = lutjax.load(tmp_path / "out")
    # What was dense keeps its dtype on disk.
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found["layers"]["1"])
    assert_same_bits(
        jax.tree.map(lambda leaf: leaf, found["layers"]["1"]["self_attn"]),
        kept["layers"]["1"]["self_attn"],
    )
    assert_same_bits(
        widened["post_attention_layernorm"], kept["layers"]["1"]["post_attention_layernorm"]
    )
    assert found["layers"]["0"]["mlp"]["down_proj"]["kernel"].group_size == 32


def test_commands_run_them(tmp_path, config, capsys):
    write_quantized(tmp_path / "m", config, CASES["awq"])
    tiny_tokenizer(config.vocab_size).save(tmp_path / "m")
    (tmp_path / "text.txt").write_text("abc def ghij klm. nop 123? " * 4)

    def run(command, *options):
        assert main([command, str(tmp_path / "m"), *options]) == 0
        return capsys.readouterr().out

    keep = "--keep-quantized"
    prompt = ("--prompt", "abc", "--max-new-tokens", "5")
    assert len(run("generate", *prompt)) == 6
    assert run("generate", *prompt, keep) == run("generate", *prompt)
    text = ("--text", str(tmp_path / "text.txt"), "--window", "16", "--json")
    (dense,), (kept,) = json.loads(run("eval", *text)), json.loads(run("eval", *text, keep))
    assert kept["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert kept["bits_per_weight"] < 7 < dense["bits_per_weight"]
    assert "LutArray" not in run("inspect", "--json")
    assert "LutArray" in run("inspect", "--json", keep)


def test_compressing_again_starts_from_the_values(tmp_path, config):
    write_quantized(tmp_path / "m", config, CASES["gptq-8"])
    _, dense, _ = lutjax.load(tmp_path / "m")
    recipe = lutjax.Recipe.uniform(group_size=32)
    compress_checkpoint(tmp_path / "m", tmp_path / "out", recipe)
    _, found, _ = lutjax.load(tmp_path / "out")
    expected = lutjax.quantize(dense, recipe)
    assert_same_bits(found["layers"]["1"]["mlp"], expected["layers"]["1"]["mlp"])


def test_biases(tmp_path, config):
    """A bias with a place is read; one of zeros without a place is ignored, any other refused."""
    config = dataclasses.replace(config, model_type="qwen2", qkv_bias=True)
    tensors, expected = write_quantized(tmp_path / "m", config, CASES["gptq-4"])
    bias = open_checkpoint(tmp_path / "m").read("layers/1/self_attn/q_proj/bias")
    np.testing.assert_array_equal(bias, expected["model.layers.1.self_attn.q_proj.bias"])
    assert bias.any()
    tensors[f"{LAYER}.bias"] = np.zeros(96, np.float16)
    write_tensors(tmp_path / "m", config, CASES["gptq-4"].config, tensors)
    open_checkpoint(tmp_path / "m")
    tensors[f"{LAYER}.bias"][3] = 1
    write_tensors(tmp_path / "m", config, CASES["gptq-4"].config, tensors)
    with pytest.raises(ValueError, match=r"up_proj\.bias' has no place"):
        open_checkpoint(tmp_path / "m")


def test_model_optimizer_may_say_it_beside_config_json(tmp_path, config):
    tensors, expected = write_quantized(tmp_path / "m", config, CASES["modelopt-nvfp4"])
    attention = "model.layers.0.self_attn"
    for name in (f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"):
        tensors[name] = np.ones(1, np.float32)  # of a cache of 8 bits
    write_tensors(tmp_path / "m", config, None, tensors)
    path = tmp_path / "m" / "hf_quant_config.json"
    path.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    np.testing.assert_array_equal(
        open_checkpoint(tmp_path / "m").read(UP), expected[f"{LAYER}.weight"].T
    )
    path.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: modelopt with quant_algo='W4A8"):
        open_checkpoint(tmp_path / "m")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"hf_quant_config\.json has no object 'quantization'"):
        open_checkpoint(tmp_path / "m")


def test_a_quantised_cache_alone_leaves_weights_as_they_are(tmp_path, config):
    values = random_values(config)
    write_hf(tmp_path / "m", config, hf_tensors(values))
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    (tmp_path / "m" / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m").read(UP), values[UP])


def test_not_a_number_if_it_is_wanted(tmp_path, config):
    for name, suffix in (("fp8", "weight"), ("modelopt-nvfp4", "weight_scale_2")):
        tensors, _ = write_quantized(tmp_path / name, config, CASES[name])
        tensors[f"{LAYER}.{suffix}"].reshape(-1)[:1] = np.nan
        write_tensors(tmp_path / name, config, CASES[name].config, tensors)
        _, dense, _ = lutjax.load(tmp_path / name, allow_nonfinite=True)
        _, kept, _ = lutjax.load(tmp_path / name, allow_nonfinite=True, keep_quantized=True)
        up = np.asarray(dense["layers"]["1"]["mlp"]["up_proj"]["kernel"])
        assert np.isnan(up).sum() == {"weight": 1, "weight_scale_2": up.size}[suffix]
        found = kept["layers"]["1"]["mlp"]["up_proj"]["kernel"].materialize()
        np.testing.assert_array_equal(found, up)


def test_a_dead_matrix_has_the_factor_zero(tmp_path, config):
    tensors, _ = write_quantized(tmp_path / "m", config, CASES["modelopt-nvfp4"])
    tensors[f"{LAYER}.weight_scale_2"] = np.zeros((), np.float32)
    write_tensors(tmp_path / "m", config, CASES["modelopt-nvfp4"].config, tensors)
    assert not open_checkpoint(tmp_path / "m").read(UP).any()


def test_exponents_may_be_floats_and_block_sizes_text(tmp_path, config):
    tensors, expected = write_quantized(tmp_path / "a", config, CASES["mxfp8"])
    for name, value in tensors.items():
        if name.endswith(".weight_scale"):
            tensors[name] = value.view(ml_dtypes.float8_e8m0fnu)
    write_tensors(tmp_path / "a", config, CASES["mxfp8"].config, tensors)
    found = open_checkpoint(tmp_path / "a").read(UP)
    np.testing.assert_array_equal(found, expected[f"{LAYER}.weight"].T)
    tensors, expected = write_quantized(tmp_path / "b", config, CASES["compressed-fp8-block"])
    quantization = scheme_with("compressed-fp8-block", block_structure="40x32")
    write_tensors(tmp_path / "b", config, quantization, tensors)
    found = open_checkpoint(tmp_path / "b").read(UP)
    np.testing.assert_array_equal(found, expected[f"{LAYER}.weight"].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_offsets_are_exact(dtype, bits):
    """For every code and zero point, and scales with all bits of the significand set."""
    top = 2 - float(ml_dtypes.finfo(dtype).eps)
    scales = np.array([top, -top, top * 2**-14, 1.0, 0.1]).astype(dtype)
    codes = np.arange(2**bits, dtype=np.uint8)
    for zero in range(2**bits):
        zeros = np.full((len(scales), 1), zero, np.uint8)
        grid = integer_blocks(
            np.tile(codes, (len(scales), 1)),
            zeros,
            scales[:, None],
            bits=bits,
            group_size=2**bits,
        )
        exact = (codes.astype(np.float64) - zero) * scales[:, None].astype(np.float64)
        np.testing.assert_array_equal(grid.dense().astype(np.float64), exact)


@pytest.mark.outside
@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_transformers_saves_bitsandbytes(tmp_path, config, kind, double):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    # On a CPU, bitsandbytes 0.50.2 dequantises rows that end within a block wrongly.
    config = dataclasses.replace(config, intermediate_size=128)
    write_hf(tmp_path / "dense", config, hf_tensors(random_values(config)))
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=options, device_map="cpu", dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "m")
    # As float32 layers; the four-bit products of a CPU are not of float32.
    check_logits(tmp_path / "m", theirs.dequantize(dtype=torch.float32))


@pytest.mark.outside
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", ["compressed-8-column", "compressed-fp8"])  # scales in float32
def test_transformers_reads_compressed_tensors(tmp_path, config, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    write_quantized(tmp_path / "m", config, CASES[name])
    options = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=options, device_map="cpu", dtype=torch.float32
    )
    check_logits(tmp_path / "m", theirs)


@pytest.mark.outside
def test_transformers_reads_fp8(tmp_path, config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_quantized(tmp_path / "m", config, CASES["fp8"])
    options = transformers.FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=options, device_map="cpu", dtype=torch.float32
    )
    check_logits(tmp_path / "m", theirs)


def check_logits(directory, theirs):
    """Compares a directory, kept quantised, with a model of transformers."""
    import torch

    tokens = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    model, params, _ = lutjax.load(directory, keep_quantized=True)
    logits = jax.jit(lutjax.lift(model.apply))({"params": params}, jnp.asarray(tokens, jnp.int32))
    # float32 on both sides, sums of at most 96 terms.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_layers_that_gptqmodel_left_as_they_are_need_no_options():
    skipped = GPTQ_4 | {"dynamic": {r"-:.*down": {}}}
    assert method_from_config(skipped, "a file") == method_from_config(GPTQ_4, "a file")


# What is refused


def test_sorted_columns_have_to_be_announced(tmp_path, config):
    case = CASES["gptq-4-act"]
    tensors, _ = write_quantized(tmp_path / "m", config, case)
    expected = open_checkpoint(tmp_path / "m").read(UP)
    write_tensors(tmp_path / "m", config, case.config | {"desc_act": False}, tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    np.testing.assert_array_equal(checkpoint.read(UP), expected)
    with pytest.raises(ValueError, match=r"mlp/up_proj/kernel are sorted.*desc_act to true"):
        grid_array(checkpoint, UP)


def drop(suffix):
    return lambda tensors: tensors.pop(f"{LAYER}.{suffix}")


def change(suffix, edit):
    name = f"{LAYER}.{suffix}"
    return lambda tensors: tensors.update({name: np.ascontiguousarray(edit(tensors[name]))})


def state_with(**fields):
    def edit(value):
        return np.frombuffer(json.dumps(json.loads(value.tobytes()) | fields).encode(), np.uint8)

    return change("weight.quant_state.bitsandbytes__nf4", edit)


def half(value):
    return value[: len(value) // 2]


BAD_TENSORS = {
    "gptq-4": [
        (drop("qzeros"), r"up_proj\.qzeros' is missing"),
        (drop("scales"), r"up_proj\.scales' is missing"),
        (drop("qweight"), r"up_proj\.weight' is missing; the nearest name"),
        (change("qweight", half), r"up_proj\.qzeros' has shape \[2, 12\]; it must be \[1, 12\]"),
        (change("qzeros", half), r"up_proj\.qzeros' has shape \[1, 12\]; it must be \[2, 12\]"),
        (change("scales", lambda v: v[:, 1:]), r"up_proj\.scales' has shape \[2, 95\]"),
        (change("scales", lambda v: v.astype(np.float32)), r"scales' has dtype F32; .* F16 or"),
        (change("qzeros", lambda v: v.astype(np.int16)), r"up_proj\.qzeros' has dtype I16"),
        (change("qweight", lambda v: v.reshape(-1)), r"qweight' has shape \[768\]; it must be a m"),
        (change("qweight", lambda v: v[:0]), r"qweight' has shape \[0, 96\]; it must be a matrix"),
        (change("g_idx", half), r"up_proj\.g_idx' has shape \[32\]; it must be \[64\]"),
        (
            lambda t: t.update({f"{LAYER}.extra": np.zeros(1, np.float32)}),
            r"up_proj\.extra' has no place",
        ),
    ],
    "gptq-3": [(change("qweight", lambda v: v[:4]), r"qweight' of shape \[4, 96\] does not hold")],
    "gptq-4-act": [(drop("g_idx"), r"up_proj\.g_idx' is missing")],
    "awq": [
        (drop("qzeros"), r"up_proj\.qzeros' is missing"),
        (change("scales", half), r"up_proj\.scales' has shape \[1, 96\]; it must be \[2, 96\]"),
        (change("qweight", half), r"up_proj\.qzeros' has shape \[2, 12\]; it must be \[1, 12\]"),
    ],
    "nf4": [
        (drop("weight.absmax"), r"up_proj\.weight\.absmax' is missing"),
        (drop("weight.quant_map"), r"up_proj\.weight\.quant_map' is missing"),
        (drop("weight.quant_state.bitsandbytes__nf4"), r"bitsandbytes__nf4' is missing"),
        (change("weight", half), r"up_proj\.weight' has shape \[1536, 1\]; it must be \[3072, 1\]"),
        (change("weight.absmax", half), r"weight\.absmax' has shape \[48\]; it must be \[96\]"),
        (state_with(shape=[32, 192]), r"up_proj\.weight' has shape \[32, 192\].* \[96, 64\]"),
        (state_with(shape=[96]), r"bitsandbytes__nf4' does not describe a matrix"),
        (state_with(blocksize=0), r"bitsandbytes__nf4' has sizes \(96, 64, 0, 1\)"),
    ],
    "nf4-double": [(drop("weight.nested_absmax"), r"up_proj\.weight\.nested_absmax' is missing")],
    "compressed-4": [
        (drop("weight_scale"), r"up_proj\.weight_scale' is missing"),
        (change("weight_scale", half), r"weight_scale' has shape \[48, 2\]; it must be \[96, 2\]"),
    ],
    "compressed-4-asym": [
        (drop("weight_zero_point"), r"up_proj\.weight_zero_point' is missing"),
        (change("weight_scale", lambda v: v.astype(np.float32)), r"weight_scale' has dtype F32"),
    ],
    "fp8": [
        (drop("weight_scale_inv"), r"up_proj\.weight_scale_inv' is missing"),
        (change("weight_scale_inv", half), r"scale_inv' has shape \[3, 2\]; it must be \[6, 2\]"),
        (
            change("weight", lambda v: v.view(np.int8)),
            r"up_proj\.weight' has dtype I8; it must be F8",
        ),
    ],
    "compressed-int8": [
        (
            change("weight_scale", half),
            r"shape \[48, 1\]; it must be \[\] or \[1\] or .* \[96, 1\]",
        ),
    ],
    "modelopt-nvfp4": [
        (drop("weight_scale_2"), r"up_proj\.weight_scale_2' is missing"),
        (change("weight_scale", half), r"weight_scale' has shape \[48, 4\]; it must be \[96, 4\]"),
    ],
}


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [(name, *bad) for name, bads in BAD_TENSORS.items() for bad in bads],
)
def test_bad_headers_are_named_before_reading(tmp_path, config, monkeypatch, name, edit, message):
    tensors, _ = write_quantized(tmp_path / "m", config, CASES[name])
    edit(tensors)
    write_tensors(tmp_path / "m", config, CASES[name].config, tensors)
    monkeypatch.setattr(QuantizedReader, "read_grid", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "m")


def first(value):
    def edit(array):
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return edit


BAD_VALUES = {
    "gptq-4": [
        (change("g_idx", first(2)), r"up_proj\.g_idx' has group indices from 0 to 2, but .* 2 gr"),
        (change("g_idx", first(-1)), r"up_proj\.g_idx' has group indices from -1"),
        (change("g_idx", first(1)), r"up_proj\.g_idx' does not divide the columns into groups"),
        (change("scales", first(np.nan)), r"up_proj\.weight'.*(NaN|not finite)"),
    ],
    "gptq-4-sym": [
        (change("qzeros", first(0)), r"up_proj\.qzeros' has zero points from 1 to 8"),
        # As GPTQModel writes `gptq_v2`, under the name `gptq`.
        (change("qzeros", lambda v: v + 0x11111111), r"from 9 to 9, but they are 8 .* 'gptq_v2'"),
    ],
    "nf4": [(change("weight.absmax", first(np.inf)), r"up_proj\.weight'")],
    "compressed-4": [(change("weight_scale", first(np.inf)), r"up_proj\.weight'")],
    "compressed-4-act": [(change("weight_g_idx", first(9)), r"weight_g_idx' has group indices")],
    "fp8": [
        (change("weight", first(np.nan)), r"up_proj\.weight'.* (holds 1 NaN|not finite)"),
        (change("weight_scale_inv", first(np.inf)), r"up_proj\.weight'"),
    ],
    "compressed-nvfp4": [
        (change("weight_scale", first(np.nan)), r"up_proj\.weight'"),
        (change("weight_global_scale", first(0)), r"up_proj\.weight'"),
    ],
    "mxfp8": [(change("weight_scale", first(255)), r"up_proj\.weight'")],
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [(name, *bad) for name, bads in BAD_VALUES.items() for bad in bads],
)
def test_bad_values_are_named(tmp_path, config, name, edit, message, keep):
    tensors, _ = write_quantized(tmp_path / "m", config, CASES[name])
    edit(tensors)
    write_tensors(tmp_path / "m", config, CASES[name].config, tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        if keep:
            grid_array(checkpoint, UP)
        else:
            checkpoint.read(UP)


def test_truncated_files(tmp_path, config):
    write_quantized(tmp_path / "m", config, CASES["awq"])
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors.*truncated"):
        open_checkpoint(tmp_path / "m")


def scheme_with(name, **changes):
    config = json.loads(json.dumps(CASES[name].config))
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


AWQ = CASES["awq"].config
GPTQ_4 = CASES["gptq-4"].config
COMPRESSED = CASES["compressed-4"].config


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, r"by 'hqq'; supported are gptq, awq, bitsandbytes, compressed-t"),
        ({"bits": 4}, "by None; supported are gptq"),
        ("gptq-ish", "by 'gptq-ish'; supported are gptq"),
        (GPTQ_4 | {"bits": 5}, r"GPTQ with bits=5; supported are \(2, 3, 4, 8\)"),
        (GPTQ_4 | {"group_size": 0}, "GPTQ with group_size=0"),
        (GPTQ_4 | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (GPTQ_4 | {"is_marlin_format": True}, "checkpoint_format='marlin'"),
        (GPTQ_4 | {"pack_dtype": "int16"}, "pack_dtype='int16'"),
        (
            GPTQ_4 | {"dynamic": {"+:.*down": {"bits": 8}}},
            r"dynamic: '\+:\.\*down' has {'bits': 8}",
        ),
        (GPTQ_4 | {"dynamic": {".*down": {"group_size": 64}}}, r"dynamic: '\.\*down' has"),
        (AWQ | {"bits": 8}, "AWQ with bits=8; supported is 4"),
        (AWQ | {"version": "gemv"}, "AWQ with version='gemv'; supported is 'gemm'"),
        (AWQ | {"group_size": None}, "AWQ with group_size=None"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "without load_in_4bit"),
        (CASES["nf4"].config | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage='bfloat16'"),
        (COMPRESSED | {"format": "marlin-24"}, "format='marlin-24'; supported are pack-quantized,"),
        (
            COMPRESSED | {"format": "nvfp4-pack-quantized"},
            r"type='int'; supported are \('float',\)",
        ),
        (COMPRESSED | {"format": "int-quantized"}, r"num_bits=4; supported are \(8,\)"),
        (scheme_with("compressed-int8", symmetric=False), "symmetric=False"),
        (scheme_with("compressed-fp8-block", block_structure=[128]), r"block_structure=\[128\]"),
        (scheme_with("compressed-fp8-block", block_structure="8x"), r"block_structure=\[8, ''\]"),
        (scheme_with("compressed-4", num_bits=4.0), r"num_bits=4\.0"),
        (scheme_with("compressed-4", symmetric="false"), "symmetric='false'"),
        (scheme_with("compressed-4", group_size=True), "group_size=True"),
        (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config="),
        (CASES["modelopt-fp8"].config | {"quant_algo": ["FP8"]}, r"quant_algo=\['FP8'\]"),
        (CASES["fp8"].config | {"weight_block_size": [True, True]}, r"weight_block_size=\[True, "),
        (CASES["fp8"].config | {"fmt": "e5m2"}, "fp8 with fmt='e5m2'; supported is 'e4m3'"),
        (CASES["fp8"].config | {"weight_block_size": [0, 1]}, r"weight_block_size=\[0, 1\]; it is"),
        (CASES["modelopt-fp8"].config | {"quant_algo": "W4A8_AWQ"}, "quant_algo='W4A8_AWQ'; suppo"),
        (COMPRESSED | {"config_groups": {}}, "config_groups={}; supported is one"),
        (COMPRESSED | {"config_groups": {"a": {}, "b": {}}}, "supported is one"),
        (COMPRESSED | {"config_groups": {"W4A16": ["Linear"]}}, r"the scheme \['Linear'\]"),
        (COMPRESSED | {"config_groups": {"a": {"weights": None}}}, "whose 'weights' are spelled"),
        ({"quant_method": ["gptq"]}, r"by \['gptq'\]; supported are"),
        (scheme_with("compressed-4", num_bits=3), r"num_bits=3; supported are \(4, 8\)"),
        (scheme_with("compressed-4", type="float"), "type='float'"),
        (scheme_with("compressed-4", strategy="block"), "strategy='block'"),
        (scheme_with("compressed-4", group_size=None), "group_size=None"),
    ],
)
def test_unsupported_configurations_are_named(tmp_path, config, quantization, message):
    write_tensors(tmp_path / "m", config, quantization, {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        open_checkpoint(tmp_path / "m")
