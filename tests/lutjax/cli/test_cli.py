from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import dense_params, write_hf

import lutjax
from lutjax.calibrate import kl_divergence, quantize_decoder
from lutjax.cli import main
from lutjax.cli.main import COMMANDS
from lutjax.cli.models import load_model
from lutjax.evaluate import windows
from lutjax.models import stack_layers

TEXT = "abc def ghij klm. nop 123? " * 20


@pytest.fixture
def source(tmp_path, tiny_config):
    return str(write_hf(tmp_path / "source", tiny_config, dense_params(tiny_config)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def ok(capsys, *arguments: object) -> str:
    """Runs a command that must succeed; what it printed."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    """Runs a command that must fail for bad input; its one line on standard error."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:  # options that cannot be parsed
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert not captured.out
    assert "Traceback" not in captured.err
    return captured.err


def test_quantize_with_a_text(capsys, tmp_path, source, text):
    out = tmp_path / "out"
    options = ("--group-size", 16, "--bits", 3, "--text", text, "--samples", 4, "--window", 16)
    assert "14 compressed matrices" in ok(capsys, "quantize", source, "-o", out, *options)
    model, params, _ = lutjax.load(out)
    _, dense, tokenizer = lutjax.load(source)
    tokens = windows(tokenizer.encode(TEXT, add_special_tokens=False), 16, 4)
    expected = quantize_decoder(model.config, dense, tokens, lutjax.Recipe.uniform(3, 16))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    rounded = lutjax.quantize(dense, bits=3, group_size=16)
    assert jax.tree.structure(params) == jax.tree.structure(rounded)
    path = ("layers", "0", "mlp", "up_proj", "kernel")
    weights = [functools.reduce(dict.__getitem__, path, p).words for p in (params, rounded)]
    assert (weights[0] != weights[1]).any()


def test_quantize_embeddings(capsys, tmp_path, source, text):
    _, dense, _ = lutjax.load(source)
    recipe = lutjax.Recipe.uniform(3, 16)
    file = tmp_path / "recipe.json"
    file.write_text(dataclasses.replace(recipe, embeddings=lutjax.LutConfig(8, 16)).to_json())
    nearest = ("--bits", 3, "--group-size", 16, "--embedding-bits", 8)
    on_a_text = (*nearest, "--text", text, "--samples", 2, "--window", 16)
    for out, options in {"a": nearest, "b": on_a_text, "c": ("--recipe", file)}.items():
        ok(capsys, "quantize", source, "-o", tmp_path / out, *options)
        _, params, _ = lutjax.load(tmp_path / out)
        expected = lutjax.quantize(dense, recipe.with_embeddings(8, 16))
        assert lutjax.summarize(params) == lutjax.summarize(expected)
        assert params["embed_tokens"]["embedding"].bits == 8
        ok(capsys, "generate", tmp_path / out, "--prompt", "a", "--max-new-tokens", 2)


def test_quantize_with_scales_that_learn(capsys, tmp_path, source, text):
    out, options = tmp_path / "out", ("--group-size", 16, "--bits", 2, "--text", text)
    few = ("--samples", 4, "--window", 16, "--learn-scales", 2)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        ok(capsys, "quantize", source, "-o", out, *options, *few)
    model, params, _ = lutjax.load(out)
    _, dense, tokenizer = lutjax.load(source)
    tokens = windows(tokenizer.encode(TEXT, add_special_tokens=False), 16, 4)
    start = quantize_decoder(model.config, dense, tokens, lutjax.Recipe.uniform(2, 16))
    dense_logits = model.apply({"params": dense}, tokens)
    errors = [
        float(kl_divergence(lutjax.lift(model.apply)({"params": p}, tokens), dense_logits))
        for p in (params, start)
    ]
    assert errors[0] < errors[1]
    weights = [p["layers"]["0"]["mlp"]["up_proj"]["kernel"] for p in (params, start)]
    np.testing.assert_array_equal(weights[0].words, weights[1].words)
    assert weights[0].scales.dtype == jnp.bfloat16


def test_version(capsys):
    assert ok(capsys, "--version") == f"lutjax {lutjax.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"\nlutjax {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_overview(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


def test_quantize_eval_inspect_generate(capsys, tmp_path, source, text):
    out = tmp_path / "out"
    printed = ok(capsys, "quantize", source, "-o", out, "--group-size", 16, "--bits", 3)
    assert "14 compressed matrices" in printed
    _, params, _ = lutjax.load(out)
    _, dense, _ = lutjax.load(source)
    expected = lutjax.quantize(dense, bits=3, group_size=16)
    assert lutjax.summarize(params) == lutjax.summarize(expected)

    options = ("--text", text, "--window", 64, "--chunks", 2)
    results = json.loads(ok(capsys, "eval", source, out, *options, "--json"))
    assert [result["model"] for result in results] == [source, str(out)]
    assert [result["tokens"] for result in results] == [126, 126]
    assert results[0]["bits_per_weight"] == 32
    summary = lutjax.summarize(params)
    assert results[1]["bits_per_weight"] == summary.compressed.bits_per_weight
    assert results[1]["megabytes"] == summary.nbytes / 1e6
    assert results[0]["perplexity"] != results[1]["perplexity"]
    table = ok(capsys, "eval", out, *options)
    assert f"{results[1]['perplexity']:.4f}" in table
    (half,) = json.loads(ok(capsys, "eval", out, *options, "--json", "--dtype", "bfloat16"))
    assert half["perplexity"] == pytest.approx(results[1]["perplexity"], rel=0.03)
    assert half["perplexity"] != results[1]["perplexity"]

    assert ok(capsys, "inspect", out) == f"{summary}\n"
    assert ok(capsys, "inspect", out, "--json") == summary.to_json() + "\n"

    options = ("--prompt", "abc", "--max-new-tokens", 8)
    plain = ok(capsys, "generate", out, *options)
    assert len(plain) == 9
    assert ok(capsys, "generate", out, *options, "--stream") == plain
    assert len(ok(capsys, "generate", out, *options, "--dtype", "bfloat16")) == 9
    drawn = ok(capsys, "generate", out, *options, "--temperature", 2, "--seed", 1)
    assert drawn != plain
    assert ok(capsys, "generate", out, *options, "--temperature", 2, "--seed", 1) == drawn


def test_stacked_layers_generate_the_same(capsys, tmp_path, source):
    model, params, tokenizer = lutjax.load(source)
    params = lutjax.quantize(params, bits=4, group_size=16)
    scanned = dataclasses.replace(model.config, scan_layers=True)
    lutjax.save(tmp_path / "plain", params, model.config, tokenizer)
    lutjax.save(tmp_path / "scanned", stack_layers(params), scanned, tokenizer)
    options = ("--prompt", "abc", "--max-new-tokens", 8)
    plain = ok(capsys, "generate", tmp_path / "plain", *options)
    assert ok(capsys, "generate", tmp_path / "scanned", *options) == plain


def test_dense_parts_run_in_the_dtype_of_activations_on_cpus(tmp_path, source):
    """XLA would widen bfloat16 embeddings for every token."""
    model, params, tokenizer = lutjax.load(source, jnp.bfloat16)
    params = lutjax.quantize(params, bits=4, group_size=16)
    config = dataclasses.replace(model.config, dtype=jnp.float32)
    lutjax.save(tmp_path / "out", params, config, tokenizer)
    for dtype, expected in ((None, jnp.float32), ("bfloat16", jnp.bfloat16)):
        loaded = load_model(str(tmp_path / "out"), dtype=dtype)
        assert jnp.dtype(loaded.config.dtype) == expected
        assert {leaf.dtype for _, leaf in lutjax.paths.named_leaves(loaded.params)} == {
            jnp.dtype(expected)
        }
    params["norm"]["scale"] = params["norm"]["scale"].astype(jnp.float32)
    config = dataclasses.replace(config, dtype=jnp.bfloat16)
    lutjax.save(tmp_path / "wider", params, config, tokenizer)
    assert load_model(str(tmp_path / "wider")).params["norm"]["scale"].dtype == jnp.float32


def test_a_stream_prints_what_is_pending_at_its_end(capsys, source, monkeypatch):
    monkeypatch.setattr("lutjax.io.TextStream.finish", lambda stream: "<end>")
    options = ("--prompt", "abc", "--max-new-tokens", 2, "--stream")
    assert ok(capsys, "generate", source, *options).endswith("<end>\n")


def test_inspect_of_a_dense_model_reads_no_weight(capsys, source, monkeypatch):
    monkeypatch.setattr("lutjax.io.readers.read_bytes", lambda info: pytest.fail("read"))
    table = ok(capsys, "inspect", source)
    assert "layers/1/mlp/up_proj/kernel" in table
    assert "20x28" in table


def test_recipe_file(capsys, tmp_path, source):
    recipe = tmp_path / "recipe.json"
    rules = [
        {"pattern": "*/mlp/*", "config": {"bits": 2, "group_size": 16}},
        {"pattern": "embed_tokens/embedding", "config": {"bits": 8, "group_size": "column"}},
    ]
    recipe.write_text(json.dumps({"rules": rules}))
    printed = ok(capsys, "quantize", source, "-o", tmp_path / "out", "--recipe", recipe)
    assert "8 matrices stay dense, such as layers/0/self_attn/k_proj/kernel" in printed
    _, params, _ = lutjax.load(tmp_path / "out")
    assert params["layers"]["0"]["mlp"]["up_proj"]["kernel"].bits == 2
    assert params["embed_tokens"]["embedding"].bits == 8
    assert not lutjax.is_compressed(params["layers"]["0"]["self_attn"]["q_proj"]["kernel"])


def test_higgs(capsys, tmp_path, source):
    out = tmp_path / "out"
    ok(capsys, "quantize", source, "-o", out, "--higgs", "--bits", 2.5, "--group-size", 16)
    _, params, _ = lutjax.load(out)
    kernel = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert repr(kernel).startswith("RotatedArray(block=16, LutArray(")
    assert kernel.base.bits == 5 and kernel.base.vector_size == 2


def test_double_quantisation_and_dtype(capsys, tmp_path, source):
    out = tmp_path / "out"
    options = ("--group-size", "column", "--codebook", "int", "--double-quant")
    ok(capsys, "quantize", source, "-o", out, *options)
    _, params, _ = lutjax.load(out)
    kernel = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert "quantised scales" in repr(kernel)
    assert kernel.group_size == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 0), "bits=0"),
        (("--bits", 9), "bits=9"),
        (("--bits", "four"), "four"),
        (("--bits", 2.5), "bits=2.5"),
        (("--bits", "nan"), "bits=nan"),
        (("--bits", "inf", "--higgs"), "bits=inf"),
        (("--group-size", 0), "group_size=0"),
        (("--bits", 4.5, "--higgs"), "bits=4.5"),
        (("--group-size", "column", "--higgs"), "'column' cannot be rotated"),
        (("--higgs", "--codebook", "int"), "either --higgs or --codebook"),
        (("--group-size", 15), "group_size=15"),
        (("--group-size", 64), "group_size=64 is larger than K="),
        (("--group-size", "row"), "row"),
        (("--codebook", "nf5"), "unknown codebook 'nf5'"),
        (("--bits", 3, "--codebook", "fp4"), "fp4"),
        (("--scale-dtype", "int8"), "int8"),
        (("--recipe", "nothing.json"), "nothing.json"),
        (("--embedding-bits", 9), "bits=9"),
        (("--embedding-bits", 8, "--recipe", "r"), "either --recipe or --embedding-bits"),
        (("--keep-quantized",), "keep_quantized"),
        (("--samples", 3), "--samples needs --text"),
        (("--learn-scales", 1), "--learn-scales needs --text"),
        (("--text", "t", "--learn-scales", -1), "--learn-scales -1 must not be negative"),
        (("--text", "t", "--keep-quantized"), "either --text or --keep-quantized"),
        (("--text", "no-such-file"), "no-such-file"),
    ],
)
def test_bad_options_of_quantize(capsys, tmp_path, source, options, message):
    if not {"--group-size", "--recipe"} & set(options):
        options = ("--group-size", 16, *options)
    assert message in fails(capsys, "quantize", source, "-o", tmp_path / "out", *options)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a recipe"),
        ('{"rules": [{"pattern": "*/mpl/*", "config": {"group_size": 16}}]}', "'*/mpl/*'"),
        ('{"rules": [{"pattern": "*", "config": {"bits": 9}}]}', "bits=9"),
        ('{"rules": [{"pattern": "*", "config": {"bitss": 4}}]}', "'bitss'"),
    ],
)
def test_bad_recipes(capsys, tmp_path, source, text, message):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(text)
    arguments = ("quantize", source, "-o", tmp_path / "out", "--recipe", recipe)
    assert message in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_recipe_excludes_the_other_options(capsys, tmp_path, source):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(lutjax.Recipe.uniform(group_size=16).to_json())
    arguments = ("quantize", source, "-o", tmp_path / "out", "--recipe", recipe, "--bits", 3)
    assert "either --recipe or --bits" in fails(capsys, *arguments)


def test_an_existing_output(capsys, tmp_path, source):
    (tmp_path / "out").mkdir()
    arguments = ("quantize", source, "-o", tmp_path / "out", "--group-size", 16)
    assert "out exists" in fails(capsys, *arguments)
    assert not list((tmp_path / "out").iterdir())


def damage(kind: str, source, tmp_path) -> str:
    """Spoils the dense checkpoint in one way; returns what the message must name."""
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    config = source / "config.json"
    if kind == "no directory":
        source.rename(tmp_path / "elsewhere")
        return "source does not exist"
    if kind == "no weights":
        weights.unlink()
        return "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(data[:-7])
        return "truncated"
    if kind == "absurd header":
        weights.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
        return str(1 << 60)
    if kind == "missing shard":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model-00001-of-00002.safetensors"
    if kind == "wrong dtype":
        weights.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"'))
        return "I32"
    if kind == "architecture":
        config.write_text(config.read_text().replace('"llama"', '"mamba"'))
        return "'mamba'; supported are llama, mistral, mixtral, qwen2"
    if kind == "NaN":
        weights.write_bytes(data[:-4] + np.float32(np.nan).tobytes())
        return "1 NaN"
    assert kind == "no configuration"
    config.unlink()
    return "config.json"


DAMAGE = (
    "no directory",
    "no weights",
    "truncated",
    "absurd header",
    "missing shard",
    "wrong dtype",
    "architecture",
    "NaN",
    "no configuration",
)


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_checkpoints(capsys, tmp_path, source, text, kind):
    message = damage(kind, tmp_path / "source", tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    arguments = ("quantize", source, "-o", tmp_path / "out", "--group-size", 16)
    assert message in fails(capsys, *arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert message in fails(capsys, "eval", source, "--text", text)
    assert message in fails(capsys, "generate", source, "--prompt", "a")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 40, b"nonsense" * 10])
def test_bad_gguf(capsys, tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    assert "model.gguf" in fails(capsys, "quantize", path, "-o", tmp_path / "out")
    assert "model.gguf" in fails(capsys, "inspect", path)


def test_a_missing_gguf(capsys, tmp_path):
    assert "model.gguf" in fails(capsys, "inspect", tmp_path / "model.gguf")


def test_bad_text(capsys, tmp_path, source, text):
    long = fails(capsys, "eval", source, "--text", text, "--window", 10_000)
    assert "--window 10000 is more than the 128 tokens of context" in long
    assert "none.txt" in fails(capsys, "eval", source, "--text", tmp_path / "none.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xe9t\xe9")
    assert "latin.txt is not UTF-8" in fails(capsys, "eval", source, "--text", path)
    few = ("--window", 16, "--chunks", 0)
    assert "chunks=0" in fails(capsys, "eval", source, "--text", text, *few)
    assert "window=1 " in fails(capsys, "eval", source, "--text", text, "--window", 1)
    assert "at least one model" in fails(capsys, "eval", "--text", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "A"), "prompt 0 is empty"),  # a letter that the tokenizer does not have
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens=0"),
        (("--prompt", "a", "--max-new-tokens", 1000), "context of 128"),
        (("--prompt", "a", "--temperature", -1), "temperature=-1"),
        (("--prompt", "a", "--temperature", 1, "--top-k", 0), "top_k=0"),
        (("--prompt", "a", "--temperature", 1, "--top-p", 1.5), "top_p=1.5"),
        (("--prompt", "a", "--top-p", 0.5), "--top-p needs --temperature above 0"),
        (("--prompt", "a", "--chat"), "chat template"),
        ((), "--prompt"),
    ],
)
def test_bad_options_of_generate(capsys, source, options, message):
    assert message in fails(capsys, "generate", source, *options)


def test_unknown_commands_and_options(capsys):
    assert "compress" in fails(capsys, "compress", "x")
    assert "--bit" in fails(capsys, "quantize", "x", "-o", "y", "--bit", "4")


def test_the_demo_needs_its_directory(capsys, tmp_path):
    assert "no is not a directory" in fails(capsys, "demo", "--output", tmp_path / "no")


def test_a_full_disk(capsys, tmp_path, source, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    arguments = ("quantize", source, "-o", tmp_path / "out", "--group-size", 16)
    assert "No space left on device" in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_interrupts(capsys, source, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lutjax.io.open_checkpoint", interrupt)
    assert main(["inspect", source]) == 130
    assert capsys.readouterr().err == "lutjax: interrupted\n"


def test_an_interrupted_quantize_leaves_nothing(tmp_path, source):
    """As a process, with a real signal while it writes."""
    out = tmp_path / "out"
    slow = (
        "import signal, sys, time\n"
        # A test run in the background of a shell ignores interrupts, and so would its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lutjax.io import Checkpoint; from lutjax.cli import main\n"
        "read = Checkpoint.read\n"
        "def slowly(self, path):\n"
        "    time.sleep(0.5)\n"
        "    return read(self, path)\n"
        "Checkpoint.read = slowly\n"
        f"sys.exit(main(['quantize', {source!r}, '-o', {str(out)!r}, '--group-size', '16']))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 120
        while not list(tmp_path.glob("*.incomplete")) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_closed_pipe_is_no_error(source):
    command = f"{sys.executable} -m lutjax.cli inspect {source} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("parameter")
    assert not done.stderr
