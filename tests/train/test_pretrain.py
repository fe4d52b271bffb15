"""Pretraining end to end on a tiny model: learning, exact resumption, duality, bad input."""

import dataclasses
import json
import types

import chex
import jax
import numpy as np
import pytest
import tokenizers

import lutjax
from train import pretrain as command
from train.llama_configs import LLAMA
from train.methods import METHODS
from train.pretrain import PretrainConfig, load_corpus, lowest_precision, pretrain
from train.text import Corpus, docstrings, read_text

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "the", "of", "weights"]
    path.write_text(" ".join(rng.choice(words, 3000)))
    return str(path)


@pytest.fixture
def config(text):
    return PretrainConfig(
        text=(text,),
        model="tiny",
        steps=8,
        batch_size=4,
        sequence_length=16,
        rank=4,
        refresh_every=3,
        learning_rate=1e-2,
        checkpoint_every=4,
    )


@pytest.mark.parametrize("name", ["galore_8bit", "lift"])
def test_methods_learn(config, name):
    assert name in METHODS
    result = pretrain(dataclasses.replace(config, method=name))
    assert result.losses[-1] < result.losses[0] - 0.3
    chex.assert_tree_all_finite(result.weights)


def test_adapters_and_their_dual_train_alike(config):
    # ReLoRA on weights and one-sided adapters under lift, with accumulation: two merges in 8 steps.
    runs = [
        pretrain(dataclasses.replace(config, method=name, accumulate=a))
        for name, a in (("relora", 1), ("one_sided_lora", 2))
    ]
    # float32, eight steps; the adapter form multiplies thin factors instead of whole weights.
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, atol=1e-4)
    assert runs[0].losses[-1] < runs[0].losses[0] - 0.3


def test_an_interrupted_run_resumes_exactly(config, tmp_path):
    config = dataclasses.replace(config, method="galore_8bit", cyclic_bits=(3, 8), cycles=2)
    whole = pretrain(dataclasses.replace(config, output=str(tmp_path / "whole")))
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    first = pretrain(cut, stop_at=4)
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "loss": 0}\n{"step": 6, "lo')  # killed later on
    assert not (tmp_path / "cut" / "model").exists()  # it is not trained yet
    second = pretrain(cut)
    assert first.losses + second.losses == whole.losses
    chex.assert_trees_all_equal(second.state, whole.state)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[4]["loss"] == whole.losses[4]
    again = pretrain(cut)  # nothing is left to do
    assert again.evaluations == whole.evaluations[-1:] and again.losses == []
    model, params, tokenizer = lutjax.load(tmp_path / "cut" / "model")
    assert model.config == LLAMA["tiny"]
    chex.assert_trees_all_equal(params, whole.weights)
    assert tokenizer.decode(tokenizer.encode("weights — 重み")) == "weights — 重み"

    other = dataclasses.replace(cut, rank=3, seed=1)
    with pytest.raises(ValueError, match="rank: 4 in the checkpoint, 3 asked for; seed: 0"):
        pretrain(other)


@pytest.mark.parametrize("skip", [False, True])
def test_nan_gradients_are_named_and_can_be_skipped(config, skip, monkeypatch, tmp_path):
    import train.pretrain as module

    loss = module.next_token_loss

    def poisoned(apply, params, tokens):
        # A NaN in one gradient only, at batches whose first token is even.
        scale = params["norm"]["scale"]
        nan = jax.numpy.where(tokens[0, 0] % 2 == 0, jax.numpy.nan, 0.0)
        return loss(apply, params, tokens) + (scale * nan).sum()

    monkeypatch.setattr(module, "next_token_loss", poisoned)
    config = dataclasses.replace(config, skip_nonfinite=skip, output=str(tmp_path), steps=4)
    if not skip:
        with pytest.raises(FloatingPointError, match="the gradient of 'norm/scale'"):
            pretrain(config)
        return
    result = pretrain(config)
    chex.assert_tree_all_finite(result.weights)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {r["skipped"] for r in log if "skipped" in r} == {"norm/scale"}


def test_losses_that_are_not_finite_stop_the_run(config, monkeypatch, tmp_path):
    """Also where no gradient tells, and at the end, where none is taken any more."""
    build = command.build
    for field, message in (("step", "step 0: the loss is nan"), ("evaluate", "validation loss at")):

        def poisoned(config, field=field):
            training = build(config)

            def step(*arguments):
                state, metrics = training.step(*arguments)
                return state, metrics | {"loss": metrics["loss"] * jax.numpy.nan}

            def evaluate(*arguments):
                return training.evaluate(*arguments) * jax.numpy.nan

            return dataclasses.replace(training, **{field: {"step": step}.get(field, evaluate)})

        monkeypatch.setattr(command, "build", poisoned)
        short = dataclasses.replace(config, method="adam", steps=1, output=str(tmp_path / field))
        with pytest.raises(FloatingPointError, match=message):
            pretrain(short)
        assert (tmp_path / field / "metrics.jsonl").read_text() == ""
        skipping = dataclasses.replace(short, skip_nonfinite=True, output=None)
        assert len(pretrain(skipping).losses) == 1


@pytest.mark.parametrize(
    "change,message",
    [
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"cycles": 0}, "cycles=0 must be at least 1"),
        ({"eval_every": 0}, "eval_every=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"sequence_length": -3}, "sequence_length=-3 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0 and finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0 and finite"),
        ({"tokenizer": "absent.json"}, "tokenizer='absent.json' is no file"),
        ({"scale": float("nan")}, "scale=nan must be above 0 and finite"),
        ({"characters": 0}, "characters=0 must be at least 1"),
        ({"cyclic_bits": (3, 200)}, r"cyclic_bits=\(3, 200\) must be"),
    ],
)
def test_what_would_fail_late_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_batches_depend_on_seed_and_step_alone(text):
    corpus = Corpus.of(read_text([text]))
    first = corpus.batch(0, 5, 4, 16)
    np.testing.assert_array_equal(first, corpus.batch(0, 5, 4, 16))
    assert not np.array_equal(first, corpus.batch(0, 6, 4, 16))
    assert not np.array_equal(first, corpus.batch(1, 5, 4, 16))
    assert first.shape == (4, 17)
    total = len(corpus.train) + len(corpus.validation)
    assert len(corpus.validation) == total - int(total * 0.95)
    assert corpus.validation_batches(2, 16, 3).shape == (3, 2, 17)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "2t"}, "unknown model '2t'"),
        ({"accumulate": 3}, "accumulate=3 does not divide batch_size=4"),
        ({"cyclic_bits": (1, 8)}, "cyclic_bits"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_configurations(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_bad_methods_and_texts(config, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'sgd'; use one of adam"):
        pretrain(dataclasses.replace(config, method="sgd"))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(ValueError, match="needs more text"):
        pretrain(dataclasses.replace(config, text=(str(short),)))
    with pytest.raises(FileNotFoundError):
        load_corpus(dataclasses.replace(config, text=("missing.txt",)))


def test_a_saved_truncation_of_the_tokenizer_is_left_out(config, tmp_path):
    vocab = {chr(code): code for code in range(128)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.save(str(tmp_path / "whole.json"))
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "cut.json"))
    whole, cut = (
        load_corpus(dataclasses.replace(config, tokenizer=str(tmp_path / name)))
        for name in ("whole.json", "cut.json")
    )
    np.testing.assert_array_equal(cut.train, whole.train)


def test_the_range_test_finds_the_lowest_precision_that_learns(config, monkeypatch):
    gained = {2: 0.1, 3: 0.4, 4: 0.8}
    asked = []

    def pretrain_at(config, corpus, stop_at):
        low, high = config.cyclic_bits
        assert low == high and config.output is None and stop_at == 2
        asked.append(low)
        return types.SimpleNamespace(losses=[5.0, 5.0 - gained[low]])

    monkeypatch.setattr(command, "pretrain", pretrain_at)
    config = dataclasses.replace(config, steps=20)
    assert lowest_precision(config, threshold=0.3) == 3
    assert asked == [2, 3]


def test_the_command_trains_tests_precisions_and_names_bad_input(text, capsys, monkeypatch):
    common = ["pretrain", "--text", text, "--model", "tiny", "--sequence-length", "16"]
    common += ["--steps", "20", "--rank", "4", "--learning-rate", "0.01"]
    monkeypatch.setattr("sys.argv", [*common, "--range-test", "-1"])
    assert command.main() == 0
    assert capsys.readouterr().out == "lowest precision: 2 bits\n"
    monkeypatch.setattr("sys.argv", [*common, "--method", "adam"])
    assert command.main() == 0
    assert "adam on tiny: validation loss" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*common, "--method", "sgd"])
    assert command.main() == 2
    assert "unknown method 'sgd'" in capsys.readouterr().err


def test_a_local_dataset_directory_is_read_like_one_of_the_hub(tmp_path):
    (tmp_path / "corpus").mkdir()
    rows = [json.dumps({"text": f"sentence {i}"}) for i in range(5)]
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(rows))
    assert read_text([f"{tmp_path / 'corpus'}::train"], limit=25) == "sentence 0\nsentence 1\nsen"


def test_docstrings_are_of_source_files_and_not_of_tests(tmp_path, monkeypatch):
    package = tmp_path / "sample_package"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""First."""\nasync def f():\n    """Second."""\n')
    (package / "other.py").write_text(
        'class A:\n    """First."""\n    def g(self):\n        """Third."""\n'
    )
    (package / "tests" / "test_it.py").write_text('"""Not this."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docstrings("sample_package") == "First.\n\nSecond.\n\nThird."
    with pytest.raises(ValueError, match="no Python source of 'sys'"):
        docstrings("sys")


def test_a_file_that_is_no_tokenizer_is_named(config, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json' is no tokenizer"):
        load_corpus(dataclasses.replace(config, tokenizer=str(tmp_path / "bad.json")))


def test_the_help_names_all_models_and_methods():
    words = set(PretrainConfig.__doc__.replace(",", " ").replace(".", " ").split())
    assert {*LLAMA, *METHODS} <= words
