"""Finetuning end to end on a tiny model: what is trained, exact resumption, results, bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lutjax
from lutjax.adapters import lora
from lutjax.io import load_peft, load_peft_head, save_peft
from lutjax.models import Decoder, DecoderConfig
from lutjax.paths import named_leaves
from tests.lutjax.tiny_checkpoint import assert_same_bits, dense_params, write_hf
from tests.virtual_devices import environment
from train.finetune import FinetuneConfig, finetune, main
from train.lora_step import (
    Batch,
    Trained,
    TrainState,
    hidden_states,
    make_step,
    next_token,
)
from train.metrics import MetricsWriter, read_metrics

CONFIG = DecoderConfig(
    vocab_size=39,
    hidden_size=24,
    intermediate_size=40,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> FinetuneConfig:
    directory = tmp_path_factory.mktemp("finetune")
    params = {p: v * (1 if p.endswith("scale") else 4) for p, v in dense_params(CONFIG).items()}
    write_hf(directory / "model", CONFIG, params)
    text = directory / "text.txt"
    words = np.random.default_rng(0).choice(["alpha", "beta", "the", "of"], 900)
    text.write_text(" ".join(words))
    return FinetuneConfig(
        model=str(directory / "model"),
        data=str(text),
        output=directory / "run",
        rank=4,
        sequence_length=16,
        batch_size=4,
        steps=24,
        learning_rate=2e-2,
        eval_every=24,
        checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def qlora_run(config):
    """A run that nothing interrupts."""
    config = dataclasses.replace(
        config, method="qlora", group_size=16, output=config.output / "whole"
    )
    with jax.numpy_dtype_promotion("standard"):
        return config, finetune(config, quiet=True)


def random_batch(parts: int) -> Batch:
    rng = np.random.default_rng(1)
    shape = (parts, 4 // parts, 9)
    segments = np.broadcast_to(np.array([1] * 4 + [2] * 3 + [0] * 2), shape)
    learnt = (rng.random(shape) < 0.7) & (segments > 0)
    tokens, targets = (rng.integers(0, CONFIG.vocab_size, shape) for _ in range(2))
    arrays = (tokens, segments, np.where(learnt, targets, -1))
    return Batch(*(jnp.asarray(a, jnp.int32) for a in arrays))


def random_adapter(base, rank=2):
    adapter = lora.init(base, rank, jax.random.key(0), targets=("*_proj/kernel",))
    return {
        path: dataclasses.replace(
            part, right=0.1 * jax.random.normal(jax.random.key(i), part.right.shape)
        )
        for i, (path, part) in enumerate(adapter.items())
    }


def test_gradients_are_those_of_the_dense_model_projected(config):
    """dL/dleft = dL/dW rightᵀ and dL/dright = leftᵀ dL/dW, with dL/dW of the dense model."""
    model, params, _ = lutjax.load(config.model)
    base = lutjax.quantize(params, bits=4, group_size=16)
    adapter, batch = random_adapter(base), random_batch(1)
    dense = lutjax.materialize(lora.attach(base, adapter))

    def loss(params):
        logits = model.apply({"params": params}, batch.tokens[0], segments=batch.segments[0])
        log_p = jax.nn.log_softmax(logits)
        targets = batch.targets[0]
        chosen = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jnp.where(targets >= 0, chosen, 0).sum() / (targets >= 0).sum()

    expected_loss, gradient = jax.jit(jax.value_and_grad(loss))(dense)
    # SGD at rate 1 shows the gradient as the change of the adapter.
    optimizer = optax.sgd(1.0)
    step = make_step(next_token(lutjax.lift(model.apply, strict=True)), optimizer)
    trained = Trained(adapter)
    state = TrainState(trained, optimizer.init(trained))
    state, metrics = step.update(jax.tree.map(jnp.copy, state), base, batch)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5)
    for path, part in adapter.items():
        dw = np.asarray(dict(named_leaves(gradient))[path], np.float64)
        left, right = (np.asarray(f, np.float64) for f in (part.left, part.right))
        scale = np.abs(dw).max()
        # float32 sums in another order, relative to the largest entry.
        np.testing.assert_allclose(
            part.left - state.trained.adapter[path].left, dw @ right.T, atol=1e-4 * scale
        )
        np.testing.assert_allclose(
            part.right - state.trained.adapter[path].right, left.T @ dw, atol=1e-4 * scale
        )

    halves = jax.tree.map(lambda a: a.reshape(2, 2, 9), batch)
    parts, metrics = step.update(
        TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained)), base, halves
    )
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-5)
    for path in adapter:
        np.testing.assert_allclose(
            parts.trained.adapter[path].right, state.trained.adapter[path].right, atol=1e-5
        )


def test_only_the_adapter_is_differentiated_and_returned(config):
    model, params, _ = lutjax.load(config.model)
    trained = Trained(random_adapter(params))
    step = make_step(next_token(lutjax.lift(model.apply, strict=True)), optax.sgd(1.0))
    state = TrainState(trained, optax.sgd(1.0).init(trained))
    traced = step.update.trace(state, params, random_batch(1))
    assert jax.tree.structure(traced.out_info[0].trained) == jax.tree.structure(trained)
    kernels = {leaf.shape for path, leaf in named_leaves(params) if path.endswith("_proj/kernel")}
    assert not kernels & set(_product_shapes(traced.jaxpr.jaxpr))


def _product_shapes(jaxpr):
    """Shapes of all products' results, in nested computations, too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _product_shapes(inner)


def test_qlora_learns_and_leaves_the_base_alone(qlora_run):
    config, result = qlora_run
    assert result.evaluations[24]["eval_loss"] < result.evaluations[0]["eval_loss"] - 0.3
    assert len(result.losses) == 24
    quantized = lutjax.quantize(lutjax.load(config.model)[1], bits=4, group_size=16)
    assert_same_bits(result.start.base, quantized)
    records = read_metrics(config.output)
    assert [r["step"] for r in records] == list(range(25))
    assert records[-1]["eval_loss"] == result.evaluations[24]["eval_loss"]
    assert records[1]["learning_rate"] < records[3]["learning_rate"] > records[-1]["learning_rate"]


def test_results_load_again(qlora_run):
    config, result = qlora_run
    _, params, _ = lutjax.load(config.output / "model")
    assert_same_bits(params, result.params)
    adapter = load_peft(config.output / "adapter")
    assert_same_bits(adapter, jax.tree.map(np.asarray, result.trained.adapter))
    # It started at zero, so that the adapter is the delta for the original as well.
    assert not (config.output / "delta_adapter").exists()
    again = finetune(config, quiet=True)
    assert again.losses == {}
    assert_same_bits(again.trained.adapter, result.trained.adapter)


def run_command(config: FinetuneConfig) -> list[str]:
    options = {
        f"--{f.name.replace('_', '-')}": getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    }
    words = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "train.finetune", *words]


def test_a_killed_run_resumes_where_it_was(qlora_run):
    """To the same bits as a rule; once two losses differed by a rounding."""
    whole, result = qlora_run
    config = dataclasses.replace(whole, output=whole.output.parent / "killed")
    settings = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    log = config.output / "metrics.jsonl"
    process = subprocess.Popen(
        run_command(config), cwd=ROOT, env=settings, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (log.exists() and '"step": 6,' in log.read_text()):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = read_done(log)
    resumed = finetune(config, quiet=True)
    first = min(resumed.losses)
    assert 1 < first <= reached + 1
    assert first > reached - config.checkpoint_every  # at most one interval is lost
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    close(list(resumed.losses.values()), [result.losses[n] for n in resumed.losses])
    jax.tree.map(close, resumed.trained.adapter, result.trained.adapter)
    found, expected = losses_of(config), losses_of(whole)
    assert list(found) == list(expected)
    assert found.pop(0) is expected.pop(0) is None  # measured before the first step
    close(list(found.values()), list(expected.values()))


def read_done(log: Path) -> int:
    return max(json.loads(line)["step"] for line in log.read_text().splitlines()[:-1])


def losses_of(config: FinetuneConfig) -> dict[int, float | None]:
    records = read_metrics(config.output)
    losses = {r["step"]: r.get("loss") for r in records}
    assert len(losses) == len(records)  # a step is logged once
    return losses


def test_lq_lora_writes_a_delta_for_the_original(config):
    config = dataclasses.replace(
        config,
        method="lq-lora",
        bits=3,
        group_size=16,
        steps=2,
        eval_fraction=0,
        output=config.output / "lq",
    )
    result = finetune(config, quiet=True)
    assert result.evaluations == {}
    base, initial = lora.detach(lutjax.load(config.output / "base")[1])
    assert_same_bits(base, result.start.base)
    delta = load_peft(config.output / "delta_adapter")
    for path, part in delta.items():
        assert part.rank == 8
        change = result.trained.adapter[path].materialize() - initial[path].materialize()
        np.testing.assert_allclose(part.materialize(), change, atol=1e-5)
        assert np.abs(change).max() > 1e-3
    # A decomposed checkpoint goes on with its own low-rank parts.
    more = dataclasses.replace(
        config,
        model=str(config.output / "model"),
        method="lora",
        bits=4,
        group_size=64,
        steps=1,
        output=config.output / "more",
    )
    continued = finetune(more, quiet=True)
    assert_same_bits(continued.start.adapter, result.trained.adapter)
    # PEFT cannot load that checkpoint, so that neither adapter names it.
    assert base_name(config.output / "delta_adapter") == config.model
    assert base_name(more.output / "adapter") is base_name(more.output / "delta_adapter") is None
    with pytest.raises(ValueError, match="needs a dense model"):
        finetune(dataclasses.replace(more, method="qlora", output=config.output / "x"), quiet=True)


def base_name(adapter: Path) -> str | None:
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("method", ["lora", "lq-lora"])
def test_adapters_of_experts_are_saved_with_the_model(config, tmp_path, method):
    change = {"num_experts": 3, "num_experts_per_tok": 2, "model_type": "mixtral"}
    mixture = dataclasses.replace(CONFIG, **change)
    experts = jax.jit(Decoder(mixture).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    tokenizer = lutjax.load(config.model)[2]
    lutjax.save(tmp_path / "mixture", experts["params"], mixture, tokenizer)
    options = {"model": str(tmp_path / "mixture"), "method": method, "steps": 2, "rank": 2}
    options |= {} if method == "lora" else {"group_size": 16}
    config = dataclasses.replace(config, **options, output=tmp_path / "run")
    result = finetune(config, quiet=True)
    assert "layers/0/mlp/experts/up_proj/kernel" in result.trained.adapter
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "delta_adapter").exists()
    _, loaded, _ = lutjax.load(tmp_path / "run" / "model")
    assert_same_bits(loaded, jax.device_get(result.params))


def test_an_adapter_that_goes_on_has_no_delta(config, qlora_run):
    config = dataclasses.replace(
        config,
        adapter=str(qlora_run[0].output / "adapter"),
        steps=1,
        eval_fraction=0,
        output=config.output / "goes_on",
    )
    result = finetune(config, quiet=True)
    assert_same_bits(result.start.adapter, qlora_run[1].trained.adapter)
    assert base_name(config.output / "adapter") == config.model
    assert not (config.output / "delta_adapter").exists()


def test_a_run_that_diverges_at_its_last_step_writes_no_results(config, tmp_path):
    """No training loss is taken after it."""
    config = dataclasses.replace(
        config,
        learning_rate=1e38,
        steps=1,
        warmup=0.0,
        schedule="constant",
        output=tmp_path / "run",
    )
    with pytest.raises(
        FloatingPointError, match=r"step 1: the loss on what is held out is nan; low"
    ):
        finetune(config, quiet=True)
    assert [r["step"] for r in read_metrics(config.output)] == [0]
    assert not (config.output / "adapter").exists()
    assert not [path for path in (config.output / "checkpoints").iterdir() if path.name.isdigit()]


def test_adapters_that_are_not_finite_stop_the_run(config, tmp_path, monkeypatch):
    def poisoned(*arguments):
        step = make_step(*arguments)

        def update(*arguments):
            state, metrics = step.update(*arguments)
            return jax.tree.map(lambda x: x * jnp.nan, state), metrics

        return step._replace(update=update)

    monkeypatch.setattr("train.finetune.make_step", poisoned)
    config = dataclasses.replace(config, steps=1, eval_fraction=0.0, output=tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 1: the adapter/layers/0/.*left is nan"):
        finetune(config, quiet=True)


def test_results_are_those_of_the_run(config, tmp_path):
    """A run in the place of one whose checkpoints were deleted replaces its results."""
    config = dataclasses.replace(
        config, method="qlora", group_size=16, steps=2, eval_fraction=0.0, output=tmp_path / "run"
    )
    finetune(config, quiet=True)
    (config.output / "classes.json").write_text("[]")  # of another task
    shutil.rmtree(config.output / "checkpoints")
    other = dataclasses.replace(config, learning_rate=1e-3)
    result = finetune(other, quiet=True)
    adapter = load_peft(config.output / "adapter")
    assert_same_bits(adapter, jax.tree.map(np.asarray, result.trained.adapter))
    assert_same_bits(lutjax.load(config.output / "model")[1], result.params)
    assert sorted(path.name for path in config.output.iterdir() if path.name != "tensorboard") == [
        "adapter",
        "base",
        "base.json",
        "checkpoints",
        "metrics.jsonl",
        "model",
    ]
    # A finished run writes what is missing and leaves the rest alone.
    shutil.rmtree(config.output / "adapter")
    before = (config.output / "model").stat().st_ino
    finetune(other, quiet=True)
    assert_same_bits(load_peft(config.output / "adapter"), adapter)
    assert (config.output / "model").stat().st_ino == before


def test_a_base_of_other_settings_is_refused(qlora_run, tmp_path):
    """Before the first checkpoint, too, which has an identity of its own."""
    whole, _ = qlora_run
    config = dataclasses.replace(whole, output=tmp_path)
    shutil.copytree(whole.output / "base", tmp_path / "base")
    with pytest.raises(ValueError, match=r"base has no base.json.*delete"):
        finetune(config, quiet=True)
    shutil.copy(whole.output / "base.json", tmp_path)
    other = dataclasses.replace(config, bits=3, seed=1)
    message = (
        r"bits: 4 in base.json, 3 asked for; seed: 0 in base.json, 1 asked for; use another "
        "--output, or delete"
    )
    with pytest.raises(ValueError, match=message):
        finetune(other, quiet=True)
    with pytest.raises(ValueError, match=r"method: 'qlora' in base.json, 'lora' asked for"):
        finetune(dataclasses.replace(config, method="lora", group_size=64), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.json"]


def test_two_by_two_devices_train_alike(qlora_run):
    """Rows over two devices, each half of the base over two: the same losses up to rounding."""
    whole, _ = qlora_run
    config = dataclasses.replace(
        whole,
        output=whole.output.parent / "mesh",
        steps=3,
        eval_fraction=0.05,
        data_parallel=2,
        model_parallel=2,
        schedule="constant",
        warmup=0.0,
    )
    alone = dataclasses.replace(
        config, output=whole.output.parent / "alone", data_parallel=1, model_parallel=1
    )
    subprocess.run(
        run_command(config), cwd=ROOT, env=environment(4), check=True, capture_output=True
    )
    expected = finetune(alone, quiet=True)
    found = [r["loss"] for r in read_metrics(config.output)[1:]]
    np.testing.assert_allclose(found, list(expected.losses.values()), rtol=1e-5)


def test_tensorboard_gets_the_numbers_if_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, directory):
            written.append(directory)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with MetricsWriter(tmp_path, 0, quiet=True) as writer:
        writer.write({"step": 3, "loss": 2.5})
    assert written == [str(tmp_path / "tensorboard"), ("loss", 2.5, 3), "closed"]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # not installed
    with MetricsWriter(tmp_path, 3, quiet=True) as writer:
        writer.write({"step": 4, "loss": 2.0})
    assert len(written) == 3
    assert [r["step"] for r in read_metrics(tmp_path)] == [3, 4]


@pytest.fixture(scope="module")
def classifier_run(config):
    """Which of two words does a text have? In bfloat16, with remat, and a part at a time."""
    directory = Path(config.model).parent
    rng = np.random.default_rng(1)
    lines = ["sentence,other,label"]
    for i in range(120):
        word = ("alpha", "beta")[i % 2]
        others = " ".join(rng.choice(["the", "of"], 2))
        lines.append(f"{others} {word},{rng.choice(['the', 'of'])},{('good', 'bad')[i % 2]}")
    data = directory / "labelled.csv"
    data.write_text("\n".join(lines) + "\n")
    config = dataclasses.replace(
        config,
        task="classification",
        data=str(data),
        text_fields=("sentence", "other"),
        method="qlora",
        group_size=16,
        output=directory / "classifier",
        sequence_length=48,
        accumulate=2,
        steps=60,
        eval_every=60,
        checkpoint_every=30,
        eval_fraction=0.2,
        dtype="bfloat16",
        remat=True,
    )
    with jax.numpy_dtype_promotion("standard"):
        return config, finetune(config, quiet=True)


def test_a_classifier_learns(classifier_run):
    config, result = classifier_run
    assert result.classes == ("bad", "good")
    before, after = result.evaluations[0], result.evaluations[60]
    np.testing.assert_allclose(before["eval_loss"], np.log(2), rtol=1e-6)  # the head starts at zero
    assert after["eval_accuracy"] > 0.95
    assert read_metrics(config.output)[-1]["eval_accuracy"] == after["eval_accuracy"]


def test_a_classifier_resumes_and_loads_again(classifier_run):
    config, result = classifier_run
    again = finetune(config, quiet=True)
    assert again.losses == {}
    assert_same_bits(again.trained, result.trained)
    np.testing.assert_array_equal(load_peft_head(config.output / "adapter"), result.trained.head)
    assert set(load_peft(config.output / "adapter")) == set(result.trained.adapter)
    assert json.loads((config.output / "classes.json").read_text()) == ["bad", "good"]
    with pytest.raises(ValueError, match=r"cannot resume.*classes: "):
        changed = Path(config.data).with_name("other.csv")
        changed.write_text(Path(config.data).read_text().replace("good", "fine"))
        finetune(dataclasses.replace(config, data=str(changed)), quiet=True)


def test_a_classifier_goes_on_with_its_head(classifier_run, tmp_path):
    config, result = classifier_run
    more = dataclasses.replace(
        config,
        adapter=str(config.output / "adapter"),
        steps=1,
        learning_rate=1e-6,
        output=tmp_path / "more",
    )
    again = finetune(more, quiet=True)
    assert again.evaluations[0] == result.evaluations[60]
    np.testing.assert_allclose(again.trained.head, result.trained.head, atol=1e-5)
    adapter = load_peft(config.output / "adapter")
    save_peft(tmp_path / "headless", adapter)
    new = dataclasses.replace(more, adapter=str(tmp_path / "headless"), output=tmp_path / "new")
    loss = finetune(new, quiet=True).evaluations[0]["eval_loss"]
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    save_peft(tmp_path / "three", adapter, head=jnp.zeros((24, 3)))
    bad = dataclasses.replace(more, adapter=str(tmp_path / "three"), output=tmp_path / "bad")
    with pytest.raises(ValueError, match="24 features and 3 classes; the model has 24 and the dat"):
        finetune(bad, quiet=True)
    assert not bad.output.exists()


def test_classes_are_predicted_from_the_last_hidden_state(config):
    """The head's product with the normalised state, from logits of a model whose head it is."""
    model, params, _ = lutjax.load(config.model)
    hidden = hidden_states(model)({"params": params}, jnp.array([[1, 2, 3]]), segments=None)
    logits = model.apply({"params": params}, jnp.array([[1, 2, 3]]))
    # float32 sums in another order.
    np.testing.assert_allclose(hidden @ params["lm_head"]["kernel"], logits, atol=1e-5)


def test_resuming_another_configuration_is_refused(qlora_run):
    config, _ = qlora_run
    with pytest.raises(ValueError, match=r"cannot resume.*learning_rate: 0.02 in the checkpoint"):
        finetune(dataclasses.replace(config, learning_rate=1.0), quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 does not split into accumulate=4"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"task": "regression"}, "task='regression' is unknown; use language or classification"),
        ({"method": "dora"}, "method='dora' is unknown; use one of lora, qlora"),
        ({"eval_fraction": 1.0}, "eval_fraction=1.0"),
        ({"method": "lora", "bits": 3}, "bits=3 has no meaning with method='lora'"),
        ({"method": "qlora", "rounds": 3}, "rounds=3 has no meaning with method='qlora'"),
        ({"method": "lq-lora", "targets": ("*q*",)}, "targets=.* with method='lq-lora'"),
        ({"method": "qlora", "recipe": Path("a"), "bits": 3}, "bits=3 .* beside recipe=a"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0 and finite"),
        ({"weight_decay": -5.0}, "weight_decay=-5.0 must be at least 0 and finite"),
        ({"clip": 0.0}, r"clip=0.0 would make every update zero; it must be above 0 \(inf"),
    ],
)
def test_bad_configurations(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_bad_input_ends_with_code_2(config, monkeypatch, capsys, tmp_path):
    bad = [
        ({"data": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"rank": 25}, "rank=25 does not fit 'layers/0/"),
        ({"sequence_length": 4096}, "beyond the model's 2048 positions"),
        ({"targets": "*nothing*"}, "no matrix matches"),
    ]
    for change, message in bad:
        changed = dataclasses.replace(config, output=tmp_path / "run", **change)
        monkeypatch.setattr(sys, "argv", ["finetune", *run_command(changed)[3:]])
        assert main() == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"sequence_length": 4096}, "beyond the model's 2048 positions"),
        ({"data_parallel": 2, "model_parallel": 64}, "data_parallel=2 times model_parallel=64 is"),
        ({"data": "{}", "task": "classification"}, "no 'label'"),
        ({"eval_data": "{}", "task": "classification"}, r"data.jsonl, record 1: .* no 'label'"),
    ],
)
def test_bad_input_is_refused_before_the_base_is_made(
    classifier_run, monkeypatch, tmp_path, change, message
):
    monkeypatch.setattr("train.finetune.prepare", lambda *_, **__: pytest.fail("compressed"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"sentence": "the", "other": "of"}\n')
    change = {k: str(data) if v == "{}" else v for k, v in change.items()}
    config = dataclasses.replace(
        classifier_run[0], **{"task": "language", "output": tmp_path / "run"} | change
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune(config, quiet=True)
    assert not config.output.exists()
