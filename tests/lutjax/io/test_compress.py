from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_checkpoint import assert_same_bits, bfloat16, dense_params, write_hf

import lutjax
from lutjax import LutArray, LutConfig, Recipe, Rule
from lutjax.io import (
    Checkpoint,
    compress_checkpoint,
    decompose_checkpoint,
    load_params,
    open_checkpoint,
)
from lutjax.io.checkpoint import open_gguf
from lutjax.io.grid import abstract_grid_array, grid_array, has_grid
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.models import DecoderConfig

UNIFORM = Recipe.uniform(group_size=16)


@pytest.fixture
def source(tmp_path, tiny_config):
    return write_hf(tmp_path / "source", tiny_config, dense_params(tiny_config))


@pytest.mark.parametrize(
    "recipe",
    [
        UNIFORM,
        Recipe.uniform(3, 16, double_quant=lutjax.DoubleQuant(block=8)),
        Recipe.uniform(2, "column", "kmeans", scale_dtype="float32"),
        Recipe(
            (
                Rule("*/down_proj/kernel", LutConfig(bits=8, group_size=16, codebook="affine")),
                Rule("embed_tokens/embedding", LutConfig(bits=8, group_size=16)),
                Rule("*/mlp/*", LutConfig(group_size=16)),
            )
        ),
    ],
    ids=["uniform", "double", "kmeans", "mixed"],
)
def test_equals_quantizing_in_memory(tmp_path, source, recipe):
    model, params, _ = lutjax.load(source)
    compress_checkpoint(source, tmp_path / "out", recipe, max_shard_bytes=4096)
    found, compressed, tokenizer = lutjax.load(tmp_path / "out")
    assert_same_bits(compressed, lutjax.quantize(params, recipe))
    assert found.config == model.config
    assert tokenizer is not None
    assert tokenizer.encode("abc") == [0, 1, 2]


def test_dense_parameters_keep_their_dtype(tmp_path, tiny_config):
    source = write_hf(tmp_path / "source", tiny_config, bfloat16(dense_params(tiny_config)))
    compress_checkpoint(source, tmp_path / "out", UNIFORM)
    _, found, _ = lutjax.load(tmp_path / "out")
    assert found["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert found["layers"]["0"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe.uniform(group_size=64), "group_size=64 is larger than K="),
        (Recipe((Rule("*/mpl/*", LutConfig(group_size=16)),)), r"'\*/mpl/\*' matches no parameter"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_reading(
    tmp_path, source, monkeypatch, recipe, message
):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=message):
        compress_checkpoint(source, tmp_path / "out", recipe)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_fisher_information_of_another_shape_is_refused_before_reading(
    tmp_path, source, tiny_config, monkeypatch
):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    fisher = {path: np.ones((3, 5), np.float32) for path in dense_params(tiny_config)}
    with pytest.raises(ValueError, match=r"Fisher information of .* has the shape \(3, 5\)"):
        decompose_checkpoint(
            source, tmp_path / "out", UNIFORM, rank=2, key=jax.random.key(0), fisher=fisher
        )
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_an_existing_output_is_refused_before_reading(tmp_path, source):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        compress_checkpoint(tmp_path / "no such source", tmp_path / "out", UNIFORM)


def test_nan_leaves_nothing(tmp_path, tiny_config):
    params = dense_params(tiny_config)
    params["layers/1/mlp/up_proj/kernel"][3, 4] = np.nan
    source = write_hf(tmp_path / "source", tiny_config, params)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*1 NaN"):
        compress_checkpoint(source, tmp_path / "out", UNIFORM)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_compressed_source_is_refused(tmp_path, source):
    compress_checkpoint(source, tmp_path / "out", UNIFORM)
    with pytest.raises(ValueError, match="compressed weights already"):
        compress_checkpoint(tmp_path / "out", tmp_path / "again", UNIFORM)


def test_progress_goes_to_standard_error(tmp_path, source, capsys):
    compress_checkpoint(source, tmp_path / "out", UNIFORM, progress=True)
    captured = capsys.readouterr()
    assert "quantize: 100%" in captured.err
    assert not captured.out


_MEASURE = """
import sys
from pathlib import Path
from lutjax import Recipe
from lutjax.io import compress_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, out = sys.argv[1:]
recipe = Recipe.uniform(group_size=32)
compress_checkpoint(small, out + "/small", recipe)  # everything is compiled and imported
Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is in use now
before = peak()
compress_checkpoint(large, out + "/large", recipe)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, tiny_config):
    """Two layers, then 64 of the same shapes: 150 MB that are never in memory together."""
    config = dataclasses.replace(
        tiny_config, hidden_size=192, intermediate_size=768, head_dim=48, num_layers=2
    )
    small = write_hf(tmp_path / "small_source", config, dense_params(config))
    config = dataclasses.replace(config, num_layers=64)
    shapes = dense_params(dataclasses.replace(config, num_layers=1))
    large_params = {
        path: shapes["layers/0/" + path.split("/", 2)[2]] if path.startswith("layers") else value
        for path, value in _paths(config, shapes).items()
    }
    large = write_hf(tmp_path / "large_source", config, large_params)
    size = (large / "model.safetensors").stat().st_size
    assert size > 140e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    # The largest tensor has 0.6 MB; the rest is the allocator's and the page cache's.
    assert int(done.stdout) < size / 4


def _paths(config, shapes):
    layer = [path.removeprefix("layers/0/") for path in shapes if path.startswith("layers/0/")]
    rest = {path: value for path, value in shapes.items() if not path.startswith("layers/")}
    return rest | {f"layers/{i}/{path}": None for i in range(config.num_layers) for path in layer}


# GGUF blocks


def write_gguf(path, config, params, kinds):
    """A Llama GGUF file without a tokenizer; `kinds` gives a type by the end of a name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    for name, value in params.items():
        stored = np.ascontiguousarray(value.T if is_transposed(name) else value)
        kind = next((kind for end, kind in kinds.items() if end in name), None)
        label = checkpoint_name(name, "gguf")
        if kind is None or value.ndim < 2:
            writer.add_tensor(label, stored)
        else:
            data = gguf.quants.quantize(stored, kind)
            writer.add_tensor(label, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    kinds = {
        "self_attn": gguf.GGMLQuantizationType.Q4_0,
        "gate_proj": gguf.GGMLQuantizationType.Q4_1,
        "up_proj": gguf.GGMLQuantizationType.Q8_0,
        "embed": gguf.GGMLQuantizationType.Q8_0,
    }
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, config, dense_params(config), kinds)


def test_grid_blocks_are_kept_bit_for_bit(gguf_file):
    checkpoint = open_gguf(gguf_file)
    dense, kept = load_params(checkpoint), load_params(checkpoint, keep_quantized=True)
    assert_same_bits(lutjax.materialize(kept), dense)
    leaves = dict(lutjax.paths.named_leaves(kept))
    bits = {
        path.split("/")[-2]: leaf.bits
        for path, leaf in leaves.items()
        if isinstance(leaf, LutArray)
    }
    assert bits == {
        **{f"{name}_proj": 4 for name in ("q", "k", "v", "o", "gate")},
        "up_proj": 8,
        "embed_tokens": 8,
    }
    assert leaves["layers/0/mlp/gate_proj/kernel"].offsets is not None
    assert leaves["layers/0/self_attn/q_proj/kernel"].offsets is None


def test_grid_shapes_are_known_before_reading(gguf_file):
    checkpoint = open_gguf(gguf_file)
    for path in checkpoint.shapes:
        if has_grid(checkpoint, path):
            found = jax.eval_shape(lambda path=path: grid_array(checkpoint, path))
            assert found == abstract_grid_array(checkpoint, path)


def test_keeping_needs_something_to_keep(source):
    with pytest.raises(ValueError, match=r"keep_quantized.*Q4_0"):
        lutjax.load(source, keep_quantized=True)


def test_the_demo_model_keeps_its_blocks(tmp_path, smollm2):
    checkpoint = open_checkpoint(smollm2.path)
    for path in ("embed_tokens/embedding", "layers/7/self_attn/k_proj/kernel"):
        array = grid_array(checkpoint, path)
        assert array.shape == checkpoint.shapes[path]
        assert (np.asarray(array.materialize()) == checkpoint.read(path)).all()


def test_a_truncated_source(tmp_path, source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        compress_checkpoint(source, tmp_path / "out", UNIFORM)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_wrong_dtype(tmp_path, tiny_config, source):
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(tiny_config.hidden_size, np.int32)
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*I32"):
        compress_checkpoint(source, tmp_path / "out", UNIFORM)
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
