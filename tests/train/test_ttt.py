"""Test-time training end to end on a tiny model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.adapters import lora
from lutjax.io import save_peft
from lutjax.models import Decoder, DecoderConfig
from tests.lutjax.tiny_checkpoint import dense_params, write_hf
from tests.train.characters import characters
from train.few_shot import Format, questions
from train.lora_step import Batch, Trained, TrainState, make_step, next_token, update_each
from train.solver import Answered, ranked, solve
from train.tasks import Pair, Query, Task, read_tasks, to_text
from train.ttt import answer_tasks, load_base, main, summary
from train.ttt_config import TTTConfig

CONFIG = DecoderConfig(
    vocab_size=117,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


def pairs(answer: str, *inputs: str) -> list[dict[str, str]]:
    return [{"input": text, "output": answer} for text in inputs]


PAIR = {"input": [[0, 0]], "output": [[0]]}  # black, which no transformation changes
TASKS = {
    # Constant rules: what a model with random weights can learn from a few steps.
    "p": {"train": pairs("p", "ab", "cd", "ef"), "test": pairs("p", "gh", "bd")},
    "q": {"train": pairs("q", "abc", "cda"), "test": [*pairs("r", "ab"), {"input": "bb"}]},
    "grid": {"train": [PAIR] * 2, "test": [PAIR]},
    "long": {"train": pairs("p", "a" * 80, "b" * 80), "test": pairs("p", "c")},
}


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TTTConfig:
    directory = tmp_path_factory.mktemp("ttt")
    params = {p: v * (1 if p.endswith("scale") else 4) for p, v in dense_params(CONFIG).items()}
    write_hf(directory / "model", CONFIG, params)
    characters().save(directory / "model")
    (directory / "tasks.json").write_text(json.dumps(TASKS))
    return TTTConfig(
        model=str(directory / "model"),
        tasks=directory / "tasks.json",
        output=directory / "run",
        bits=4,
        group_size=16,
        rank=8,
        steps=30,
        learning_rate=2e-2,
        sequence_length=96,
        instances=2,
        tokens_at_once=400,
    )


@pytest.fixture(scope="module")
def whole(config) -> tuple[TTTConfig, list[Answered]]:
    """A run that nothing interrupts."""
    config = dataclasses.replace(config, output=config.output / "whole")
    with jax.numpy_dtype_promotion("standard"):
        return config, answer_tasks(config, quiet=True)


def test_each_task_is_learnt_by_an_adapter_of_its_own(whole):
    config, results = whole
    by_name = {result.name: result for result in results}
    assert list(by_name) == sorted(TASKS)
    assert by_name["p"].right == (0, 0)
    assert by_name["p"].answers == (("p",), ("p",))
    assert by_name["q"].answers[0][0] == by_name["q"].answers[1][0] == "q"
    assert by_name["q"].right == (-1, None)
    for name in ("p", "q", "grid"):
        losses = by_name[name].losses
        assert len(losses) == config.steps
        assert np.mean(losses[-3:]) < losses[0] - 0.5
    expected = {"tasks": 4, "skipped": 1, "queries": 5, "right_at_first": 3, "right": 3}
    assert summary(results) == expected
    assert json.loads((config.output / "summary.json").read_text()) == expected


def test_without_training_nothing_is_learnt(config):
    config = dataclasses.replace(config, output=config.output / "context", steps=0)
    results = {result.name: result for result in answer_tasks(config, quiet=True)}
    assert results["p"].right == (-1, -1)
    assert results["p"].losses == ()


def test_a_task_too_long_has_no_answer(whole):
    _, results = whole
    found = next(result for result in results if result.name == "long")
    assert found.answers == ((),)
    assert found.right == (-1,)
    assert found.skipped == "it needs 188 tokens; raise sequence_length=96"


def test_grids_are_grids_again(whole):
    _, results = whole
    found = next(result for result in results if result.name == "grid")
    assert found.answers[0][0] == ((0,),)
    assert found.right == (0,)


def test_tasks_do_not_depend_on_each_other(config, whole):
    """Alone or beside others, up to the order of sums in float32."""
    start = load_base(config)
    for together in whole[1]:
        if together.skipped:
            continue
        task = next(task for task in read_tasks(config.tasks) if task.name == together.name)
        (alone,) = solve(config, start, [task])
        np.testing.assert_allclose(alone.losses, together.losses, rtol=1e-2)
        assert alone.answers == together.answers


def test_long_prompts_and_long_answers_share_the_context(config):
    """Each fits the model, but not the prompt of one with the answer of the other."""
    start = load_base(config)
    small = dataclasses.replace(start.model.config, max_position_embeddings=96)
    start = dataclasses.replace(start, model=Decoder(small))
    answer = "p" * 20
    tasks = [
        Task("prompt", (Pair("a" * 24, "b"),) * 2, (Query("a" * 10, "b"),)),
        Task("answer", (Pair("a", answer), Pair("b", answer)), (Query("c", answer),)),
    ]
    config = dataclasses.replace(config, steps=1, tokens_at_once=4096, orders=1)
    together = {result.name: result for result in solve(config, start, tasks)}
    assert all(result.skipped is None for result in together.values())
    for task in tasks:
        (alone,) = solve(config, start, [task])
        assert alone.answers == together[task.name].answers
        assert all(len(text) <= 30 for answers in alone.answers for text in answers)
    longer = Task("longer", (Pair("a", answer * 2), Pair("b", answer * 2)), (Query("c", None),))
    (found,) = solve(config, start, [longer])
    assert found.skipped is not None
    assert found.skipped.endswith("tokens; the model takes 96")


def test_grids_that_are_too_long_only_when_turned_have_no_answer(config):
    row = Pair(((1,) * 11,), ((2,) * 11,))  # turned, each cell is a line
    task = Task("row", (row, row), (Query(*row),))
    config = dataclasses.replace(config, symmetries=False, orders=1)
    (found,) = solve(config, load_base(config), [task])
    assert found.skipped == "it needs 100 tokens; raise sequence_length=96"
    untrained = dataclasses.replace(config, steps=0)
    (found,) = solve(untrained, load_base(untrained), [task])
    assert found.skipped is None


def test_answers_are_those_to_the_task_as_it_was():
    task = Task("t", (Pair(((1,),), ((2,),)),) * 2, (Query(((1,),), None), Query(((2,),), None)))
    answers = (((1, 2), (3, 4)), ((5, 6, 7),))
    asked = questions(
        task, Format.of(characters()), np.random.default_rng(0), orders=1, symmetries=True
    )
    written = [to_text(q.transformation.apply(answers[q.query])) for q in asked]
    assert ranked(task, asked, [*written, "9", "9"]) == ([[answers[0]], [answers[1]]], [])
    written[0], written[3] = "no grid", "12\n3"
    assert ranked(task, asked, written) == ([[answers[0]], [answers[1]]], ["no grid", "12\n3"])


def test_batched_steps_are_single_steps(config):
    start = load_base(config)
    step = make_step(next_token(lutjax.lift(start.model.apply)), config.optimizer())
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, 97, (3, 1, 2, 9)), jnp.int32) for _ in range(2))
    batch = Batch(tokens, jnp.ones_like(tokens), targets)
    states = [
        TrainState(trained, config.optimizer().init(trained))
        for i in range(3)
        for trained in [Trained(lora.init(start.base, 4, jax.random.key(i)))]
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)
    together, metrics = update_each(step)(stacked, start.base, batch)
    for i, state in enumerate(states):
        own = jax.tree.map(lambda a, i=i: a[i], batch)
        alone, values = step.update(state, start.base, own)
        np.testing.assert_allclose(metrics["loss"][i], values["loss"], rtol=1e-5)
        for found, expected in zip(
            jax.tree.leaves(together.optimizer), jax.tree.leaves(alone.optimizer), strict=True
        ):
            # Moments, not weights: Adam's first step is the gradient's sign, whatever its size.
            np.testing.assert_allclose(found[i], expected, atol=1e-5)


def test_an_interrupted_run_goes_on(whole, config, monkeypatch):
    config = dataclasses.replace(config, output=config.output / "again")
    _, expected = whole
    calls = []

    def two_then_stop(*arguments, **options):
        for result in solve(*arguments, **options):
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(result.name)
            yield result

    monkeypatch.setattr("train.ttt.solve", two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        answer_tasks(config, quiet=True)
    log = config.output / "predictions.jsonl"
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:
        file.write('{"name": "q", "ans')  # a kill within a line
    monkeypatch.setattr("train.ttt.solve", solve)
    results = answer_tasks(config, quiet=True)
    assert sorted(json.loads(line)["name"] for line in log.read_text().splitlines()) == [
        "grid",
        "long",
        "p",
        "q",
    ]
    assert [result.name for result in results] == [result.name for result in expected]
    assert [result.right for result in results] == [result.right for result in expected]
    with pytest.raises(ValueError, match=r"another run: steps: 30 in .*, 31 asked for"):
        answer_tasks(dataclasses.replace(config, steps=31), quiet=True)

    # Without the answers, all are to be found again.
    text = log.read_text()
    log.unlink()
    calls.clear()
    monkeypatch.setattr("train.ttt.solve", two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        answer_tasks(config, quiet=True)
    assert len(log.read_text().splitlines()) == 2
    log.write_text(text)

    # A shorter list loses nothing, and needs no model.
    monkeypatch.setattr("train.ttt.load_base", None)
    assert answer_tasks(dataclasses.replace(config, limit=1), quiet=True) == results[:1]
    assert len(log.read_text().splitlines()) == 4


def test_what_changed_is_done_again(whole, config, monkeypatch, tmp_path):
    config = dataclasses.replace(config, output=tmp_path / "run", tasks=tmp_path / "tasks.json")
    config.tasks.write_text(json.dumps(TASKS))
    asked = []

    def note(config, start, tasks, **_):
        asked.append([task.name for task in tasks])
        for task in tasks:
            if task.name == "long" and config.sequence_length < 200:
                yield Answered.none(task, "too long")
            else:
                yield Answered.of(task, [("p",)] * len(task.queries))

    monkeypatch.setattr("train.ttt.solve", note)
    monkeypatch.setattr("train.ttt.load_base", lambda _: "loaded")
    answer_tasks(config, quiet=True)
    other = TASKS | {"p": {"train": pairs("p", "ab", "cd"), "test": pairs("p", "gh")}}
    config.tasks.write_text(json.dumps(other))
    answer_tasks(config, quiet=True)
    results = answer_tasks(dataclasses.replace(config, sequence_length=200), quiet=True)
    assert asked == [["grid", "long", "p", "q"], ["long", "p"], ["long"]]
    assert [result.right for result in results if result.name in ("p", "long")] == [(0,), (0,)]
    assert len((config.output / "predictions.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"steps": -1}, "steps=-1 must be at least 0"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"clip": float("nan")}, "clip=nan must be above 0"),
        ({"bits": 0}, "bits=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_bad_options(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_a_loss_that_is_not_finite_costs_that_task_only(config):
    tasks = [task for task in read_tasks(config.tasks) if task.name in ("p", "q")]
    wild = dataclasses.replace(config, learning_rate=1e30, steps=9, clip=float("inf"))
    results = list(solve(wild, load_base(wild), tasks))
    assert sorted(result.name for result in results) == ["p", "q"]
    for result in results:
        assert result.skipped is not None
        assert "its loss is nan at step" in result.skipped
        assert result.skipped.endswith("lower learning_rate=1e+30")
        assert not any(result.answers)


def test_a_trained_adapter_and_a_compressed_model_can_be_the_start(config, tmp_path):
    start = load_base(config)
    lutjax.save(tmp_path / "small", start.base, start.model.config, start.tokenizer)
    compressed = dataclasses.replace(config, model=str(tmp_path / "small"))
    with pytest.raises(ValueError, match="small is compressed already; leave out bits=4"):
        load_base(compressed)
    adapter = {
        path: dataclasses.replace(part, right=part.right + 1)
        for path, part in start.adapter.items()
    }
    save_peft(tmp_path / "adapter", adapter, base_model=None)
    found = load_base(dataclasses.replace(compressed, bits=None, adapter=str(tmp_path / "adapter")))
    for path, part in adapter.items():
        np.testing.assert_array_equal(found.adapter[path].right, part.right)
    tasks = [task for task in read_tasks(config.tasks) if task.name == "p"]
    remat = dataclasses.replace(compressed, bits=None, steps=1, dtype="bfloat16", remat=True)
    (answered,) = solve(remat, load_base(remat), tasks)
    assert np.isfinite(answered.losses).all()


def test_the_command_line(config, monkeypatch, capsys):
    command = ["ttt", "--model", config.model, "--tasks", str(config.tasks), "--output"]
    command += [str(config.output / "cli"), "--steps", "0", "--rank", "8", "--no-symmetries"]
    monkeypatch.setattr("sys.argv", [*command, "--sequence-length", "96"])
    assert main() == 0
    out, err = capsys.readouterr()
    assert "long: no answer, it needs 188 tokens; raise sequence_length=96" in out + err
    said = "5 queries, 0.0% right at the first attempt, 0.0% at all; tasks without an answer: 1\n"
    assert out.endswith(said)
    monkeypatch.setattr("sys.argv", [*command[:4], "missing.json", *command[5:]])
    assert main() == 2
    assert "train.ttt: error: " in capsys.readouterr().err
