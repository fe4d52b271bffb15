from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoints import FAMILIES_OF_GEMMA
from tiny_checkpoint import assert_same_bits, bfloat16, dense_params, tiny_tokenizer

import lutjax
from lutjax import DoubleQuant, LowRankArray, LutArray, Recipe, SumArray
from lutjax.arrays import (
    ConcatArray,
    DenseArray,
    GatedArray,
    MatrixView,
    QuantizedScales,
    quantize_scales_like,
)
from lutjax.codebooks import kmeans
from lutjax.io import compress_checkpoint, open_compressed, read_params
from lutjax.io.checkpoint import nest
from lutjax.io.compressed import CompressedCheckpoint
from lutjax.io.new_directory import new_directory
from lutjax.models import stack_layers
from lutjax.packing import pack


def weight(shape=(48, 24), seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantized(w: jax.Array | None = None, **options) -> LutArray:
    """Contracts the last axis but one, as every `kernel` does."""
    return lutjax.quantize({"kernel": weight() if w is None else w}, **options)["kernel"]


def per_column_tables() -> LutArray:
    w = weight()
    table = kmeans(w / jnp.abs(w).max(), 3, per_channel=True)
    array = quantized(w, bits=3, group_size=16)
    return dataclasses.replace(array, lut=table[..., None])


def vector_tables() -> LutArray:
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(0, 16, size=(11, 6)))  # 22 rows, two to a code
    return LutArray(
        words=pack(codes, 4),
        scales=jnp.ones((2, 6), jnp.float16),
        lut=jnp.asarray(rng.normal(size=(1, 16, 2)), jnp.float32),
        offsets=None,
        group_size=16,
        padding=10,
        dtype=np.dtype(np.float32),
    )


def coded_scales() -> LutArray:
    array = quantized(group_size=16, codebook="affine")
    words, steps = jnp.zeros((1, 6, 1), jnp.uint8), jnp.ones((1, 1), jnp.float16)
    like = QuantizedScales(words, steps, None, padding=7, block=(2, 1), zero=3)
    scales, offsets = (quantize_scales_like(a, like) for a in (array.scales, array.offsets))
    return dataclasses.replace(array, scales=scales, offsets=offsets)


def low_rank(dtype=jnp.bfloat16) -> LowRankArray:
    return LowRankArray.of(weight((48, 3)).astype(dtype), weight((3, 24), 1).astype(dtype))


ARRAYS = {
    "1 bit": lambda: quantized(bits=1, group_size=16, codebook="affine"),
    "3 bits": lambda: quantized(bits=3, group_size=32),
    "8 bits": lambda: quantized(bits=8, group_size="column"),
    "ragged": lambda: quantized(weight((43, 5)), bits=5, group_size=20),
    "float32 scales": lambda: quantized(group_size=16, scale_dtype="float32"),
    "float16 scales": lambda: quantized(group_size=16, scale_dtype="float16"),
    "affine": lambda: quantized(group_size=16, codebook="affine"),
    "k-means": lambda: quantized(group_size=16, codebook="kmeans"),
    "double": lambda: quantized(
        group_size=16, double_quant=DoubleQuant(bits=5, block=10, dtype="bfloat16")
    ),
    "bfloat16": lambda: quantized(weight().astype(jnp.bfloat16), group_size=16),
    "stacked": lambda: quantized(weight((3, 48, 8)), group_size=16),
    "transposed": lambda: quantized(group_size=16).T,
    "heads": lambda: quantized(weight((32, 24)), group_size=16).with_view(
        MatrixView.of((32, 4, 6), (0,))
    ),
    "coded scales": coded_scales,
    "per column": per_column_tables,
    "vectors": vector_tables,
    "rotated": lambda: lutjax.quantize(weight(), lutjax.Recipe.higgs(2, 16)),
    "low rank": low_rank,
    "sum": lambda: SumArray.of(
        quantized(group_size=16, double_quant=DoubleQuant()),
        low_rank(jnp.float32),
    ),
    "columns": lambda: ConcatArray(
        (quantized(group_size=16), quantized(bits=8, group_size=32)), "n"
    ),
    "gated": lambda: GatedArray(quantized(group_size=16), jnp.float32(0.5)),
    "dense part": lambda: SumArray.of(
        quantized(group_size=16), DenseArray(weight(), np.dtype(np.float32))
    ),
    "dense bfloat16": lambda: weight().astype(jnp.bfloat16),
    "dense scalar": lambda: jnp.float16(3.0),
    "dense integers": lambda: jnp.arange(5, dtype=jnp.int8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_any_array_comes_back_bit_for_bit(tmp_path, name):
    params = {"block": {"kernel": ARRAYS[name](), "bias": jnp.zeros(3)}, "x": jnp.ones(())}
    lutjax.save(tmp_path / "out", params)
    assert_same_bits(read_params(tmp_path / "out"), params)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("scan", [False, True])
def test_a_model_comes_back(tmp_path, tiny_config, scan, family):
    config = dataclasses.replace(tiny_config, **FAMILIES_OF_GEMMA.get(family, {}))
    params = nest({p: jnp.asarray(v) for p, v in bfloat16(dense_params(config)).items()})
    config = dataclasses.replace(config, scan_layers=scan, dtype=jnp.bfloat16)
    params = lutjax.quantize(stack_layers(params) if scan else params, group_size=16)
    tokenizer = tiny_tokenizer(config.vocab_size)
    lutjax.save(tmp_path / "out", params, config, tokenizer)
    model, found, again = lutjax.load(tmp_path / "out")
    assert_same_bits(found, params)
    assert model.config == dataclasses.replace(config, dtype=jnp.dtype(jnp.bfloat16))
    assert again is not None
    assert again.encode("hello there.") == tokenizer.encode("hello there.")
    tokens = jnp.zeros((1, 4), jnp.int32)
    logits = model.apply({"params": lutjax.materialize(found)}, tokens)
    assert logits.shape == (1, 4, config.vocab_size)
    assert logits.dtype == jnp.float32

    model, wide, _ = lutjax.load(tmp_path / "out", jnp.float32)
    assert model.config.dtype == jnp.float32
    assert {leaf.dtype for _, leaf in lutjax.paths.named_leaves(wide)} == {np.dtype(np.float32)}


def test_a_dense_model_that_was_saved_can_be_compressed(tmp_path, tiny_config):
    params = nest({p: jnp.asarray(v) for p, v in dense_params(tiny_config).items()})
    lutjax.save(tmp_path / "dense", params, tiny_config)
    recipe = Recipe.uniform(3, 16)
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", recipe)
    _, loaded, _ = lutjax.load(tmp_path / "small")
    assert_same_bits(loaded, lutjax.quantize(params, recipe))
    with pytest.raises(ValueError, match="holds compressed weights already"):
        compress_checkpoint(tmp_path / "small", tmp_path / "again", recipe)
    scanned = dataclasses.replace(tiny_config, scan_layers=True)
    lutjax.save(tmp_path / "stacked", stack_layers(params), scanned)
    with pytest.raises(ValueError, match="holds stacked layers; save an unrolled decoder"):
        compress_checkpoint(tmp_path / "stacked", tmp_path / "again", recipe)


def test_shards(tmp_path):
    arrays = {f"w{i}": weight((16, 16), i).astype(jnp.bfloat16) for i in range(5)}
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        lutjax.save(tmp_path / "out", arrays, max_shard_bytes=0)
    with pytest.raises(TypeError, match=r"'key' holds key<fry>; save jax\.random\.key_data of it"):
        lutjax.save(tmp_path / "out", {"key": jax.random.key(0)})
    lutjax.save(tmp_path / "out", arrays, max_shard_bytes=1024)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert_same_bits(read_params(tmp_path / "out"), arrays)


def test_the_safetensors_library_reads_the_files(tmp_path):
    """Its numpy interface has no bfloat16, so the bytes are compared."""
    params = {"a": quantized(group_size=16), "b": weight().astype(jnp.bfloat16)}
    lutjax.save(tmp_path / "out", params)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = dict(safetensors.deserialize(data))
    assert sorted(found) == ["a.lut", "a.scales", "a.words", "b"]
    assert found["a.scales"]["dtype"] == found["b"]["dtype"] == "BF16"
    scales = np.frombuffer(found["a.scales"]["data"], ml_dtypes.bfloat16)
    assert (scales.reshape(3, 24) == np.asarray(params["a"].scales)).all()


def test_keys_may_be_numbers_and_have_slashes(tmp_path):
    params = {
        "layers": {0: {"kernel": quantized(group_size=16)}, 1: {"kernel": np.ones(2, np.float32)}},
        "mlp/~/linear_0": {"w": np.zeros(3, np.float32)},
        "0": np.zeros(1, np.float32),
    }
    lutjax.save(tmp_path / "out", params)
    found = read_params(tmp_path / "out")
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    edited = (
        (tmp_path / "out" / "lutjax.json").read_text().replace('"keys": {', '"keys": {"x": [0],')
    )
    (tmp_path / "out" / "lutjax.json").write_text(edited)
    with pytest.raises(ValueError, match="keys that are not those of its parameters"):
        read_params(tmp_path / "out")


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a/b": np.zeros(2), "a": {"b": np.zeros(2)}}, ValueError, "two parameters called 'a/b'"),
        ({"a": {"": np.zeros(2)}}, ValueError, "''"),
        ({1.5: np.zeros(2)}, ValueError, "1.5"),
        ({"a": [np.zeros(2)]}, TypeError, "'a' holds a list"),
        ({"a": {"b": {}}}, ValueError, "'a/b' is an empty dictionary"),
        ({"a": 1.0}, TypeError, "'a' holds a float"),
        ([np.zeros(2)], TypeError, "list"),
        ({"a": np.zeros(2, np.complex64)}, TypeError, "complex64"),
    ],
)
def test_what_cannot_be_saved(tmp_path, params, error, message):
    with pytest.raises(error, match=message):
        lutjax.save(tmp_path / "out", params)
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_the_configuration(tmp_path, tiny_config):
    params = dense_params(tiny_config)
    del params["norm/scale"]
    with pytest.raises(ValueError, match="'norm/scale' is missing"):
        lutjax.save(tmp_path / "out", nest(params), tiny_config)
    params["norm/scale"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"'norm/scale' has shape \(3,\)"):
        lutjax.save(tmp_path / "out", nest(params), tiny_config)
    assert not list(tmp_path.iterdir())


def test_parameters_are_converted_while_they_are_read(tmp_path, tiny_config, monkeypatch):
    lutjax.save(tmp_path / "out", nest(dense_params(tiny_config)), tiny_config)
    read, leaves, alive = CompressedCheckpoint.read, [], []

    def watched(checkpoint, path):
        alive.append(sum(leaf() is not None for leaf in leaves))
        leaf = read(checkpoint, path)
        leaves.append(weakref.ref(leaf))
        return leaf

    monkeypatch.setattr(CompressedCheckpoint, "read", watched)
    _, params, _ = lutjax.load(tmp_path / "out", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert len(leaves) > 10
    assert max(alive) <= 1  # the one before


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_existing_output_is_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="out exists"):
        lutjax.save(out, {"a": np.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_missing_parent(tmp_path):
    with pytest.raises(FileNotFoundError, match="parent directory"):
        lutjax.save(tmp_path / "no" / "out", {"a": np.zeros(2)})


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"400 B are needed but 100 B are free"):
        lutjax.save(tmp_path / "out", {"a": np.zeros(100, np.float32)})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lutjax.save(tmp_path / "out", {"a": np.zeros(20_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_at_the_tokenizer_leaves_nothing(tmp_path, tiny_config):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenizer = tiny_tokenizer(tiny_config.vocab_size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lutjax.save(tmp_path / "out", {"a": np.zeros(4, np.float32)}, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
import numpy as np, jax
from lutjax.io.compressed import write_checkpoint

def leaf(path):
    if path == "c":
        os.kill(os.getpid(), signal.SIGKILL)
    return np.ones((64, 64), np.float32)

specs = {name: jax.ShapeDtypeStruct((64, 64), np.float32) for name in "abcd"}
write_checkpoint(sys.argv[1], specs, leaf, config=None, tokenizer=None, max_shard_bytes=16384)
"""


def test_a_kill_leaves_nothing_that_loads(tmp_path):
    out = tmp_path / "out"
    process = subprocess.run([sys.executable, "-c", _KILLED, str(out)], check=False)
    assert process.returncode == -9
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".incomplete")
    assert list(left.glob("*.safetensors"))  # it was killed in the middle
    for read in (read_params, lutjax.load):
        with pytest.raises(FileNotFoundError):
            read(left)
    lutjax.save(out, {"a": np.zeros(2, np.float32)})  # the next run removes it
    assert list(read_params(out)) == ["a"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_others_are_writing_stays(tmp_path):
    array = {"a": np.zeros(2, np.float32)}
    with pytest.raises(FileExistsError), new_directory(tmp_path / "out") as slower:
        lutjax.save(tmp_path / "out-4bit", array)  # has another name
        lutjax.save(tmp_path / "out", array)
        assert slower.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-4bit"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint to damage, and a function that edits its description."""
    path = tmp_path / "out"
    lutjax.save(path, {"a": {"kernel": quantized(group_size=16)}})

    def edit(change) -> None:
        metadata = json.loads((path / "lutjax.json").read_text())
        change(metadata)
        (path / "lutjax.json").write_text(json.dumps(metadata))

    return path, edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=99), "format version 99"),
        (lambda m: m.update(format="other"), "does not describe"),
        (lambda m: m.update(parameters=[]), "does not describe"),
        (lambda m: kernel(m).update({"class": "os.system"}), "unknown description"),
        (lambda m: kernel(m)["fields"].update(group_size=24), "kernel' do not fit.*scales"),
        (lambda m: kernel(m)["fields"].update(group_size=0), "kernel' do not fit"),
        (lambda m: kernel(m)["fields"].update(padding=48), "kernel' do not fit"),
        (lambda m: kernel(m)["fields"].update(dtype={"dtype": "O"}), "unknown description"),
        (lambda m: kernel(m)["fields"].update(words={"tensor": "b.words"}), "'b.words'.*missing"),
        (lambda m: kernel(m)["fields"].update(extra=1), "LutArray cannot have the fields"),
        (lambda m: kernel(m)["fields"].pop("lut"), "LutArray cannot have the fields"),
        (
            lambda m: kernel(m)["fields"].update(lut={"tensor": "a/kernel.scales"}),
            "kernel' do not fit",
        ),
        (
            lambda m: kernel(m)["fields"].update(words={"tensor": "a/kernel.scales"}),
            "kernel' do not fit",
        ),
    ],
)
def test_a_damaged_description(saved, change, message):
    path, edit = saved
    edit(change)
    with pytest.raises(ValueError, match=message):
        open_compressed(path)


def kernel(metadata):
    return metadata["parameters"]["a/kernel"]


def test_a_truncated_file(saved):
    path, _ = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors has .* truncated"):
        read_params(path)


def test_nan_scales(tmp_path):
    array = quantized(group_size=16)
    params = {"a": dataclasses.replace(array, scales=array.scales.at[0, 0].set(jnp.nan))}
    lutjax.save(tmp_path / "out", params)
    with pytest.raises(ValueError, match=r"tensor 'a\.scales' holds NaN"):
        read_params(tmp_path / "out")
    assert_same_bits(read_params(tmp_path / "out", allow_nonfinite=True), params)


def test_load_needs_a_configuration(saved):
    with pytest.raises(ValueError, match=r"without a configuration.*read_params"):
        lutjax.load(saved[0])


def test_other_loaders_are_told_that_the_weights_are_compressed(tmp_path, tiny_config):
    params = lutjax.quantize(nest(dense_params(tiny_config)), group_size=16)
    lutjax.save(tmp_path / "out", params, tiny_config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lutjax"}
    (tmp_path / "out" / "lutjax.json").unlink()
    with pytest.raises(ValueError, match="quantised by 'lutjax'"):
        lutjax.load(tmp_path / "out")


def test_decoders_do_not_share_shapes_by_chance(tmp_path, tiny_config):
    """A checkpoint that fits the shapes of its own description but not of its configuration."""
    params = lutjax.quantize(nest(dense_params(tiny_config)), group_size=16)
    lutjax.save(tmp_path / "out", params, tiny_config)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 37', '"vocab_size": 38'))
    with pytest.raises(ValueError, match=r"embed_tokens/embedding.*\(38, 20\)"):
        lutjax.load(tmp_path / "out")
