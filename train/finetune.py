"""Finetuning of low-rank adapters on a frozen base: ``python -m train.finetune --help``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lutjax
from lutjax.adapters import lora
from lutjax.arrays import LowRankArray, has_compressed
from lutjax.files import replace_file
from lutjax.io import save_peft
from lutjax.io.new_directory import discard
from lutjax.optim import first_nonfinite, leaf_name
from train.base_model import Start, load_head, load_start, prepare, shard_base
from train.checkpoints import Checkpoints, differences
from train.command_line import exit_code
from train.examples import NOTHING, Rows
from train.finetune_config import FinetuneConfig
from train.finetune_data import Data, load_data
from train.lora_step import (
    Batch,
    Objective,
    Step,
    Trained,
    TrainState,
    classification,
    hidden_states,
    make_step,
    next_token,
)
from train.metrics import MetricsWriter, perplexity


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run ends with.

    Attributes:
      start: The model, the base, and the adapter before training.
      trained: The adapter after training, and the head of a classifier.
      classes: What the head's columns stand for.
      losses: Training loss by step, of the steps since the start or the resumption.
      evaluations: By step, ``eval_loss`` and ``eval_perplexity`` or ``eval_accuracy`` on what is
        held out.
    """

    start: Start
    trained: Trained
    classes: tuple[Any, ...]
    losses: dict[int, float]
    evaluations: dict[int, dict[str, float]]

    @property
    def params(self) -> Any:
        """Base and trained adapter."""
        return lora.attach(self.start.base, self.trained.adapter)


def finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneResult:
    """Trains, going on from the output directory's last checkpoint if there is one.

    The output directory gets ``metrics.jsonl``, ``checkpoints/``, the base as it was at the start
    if the run compressed it (``base/``, and in ``base.json`` what it was made from), and at the end

    * ``adapter/``: the adapter for its base, in PEFT's format, with the head of a classifier, whose
      classes are in ``classes.json``; not where experts have adapters, which PEFT cannot hold;
    * ``model/``: base and adapter together for :func:`lutjax.load`, if the base is compressed or
      there is no ``adapter/``;
    * ``delta_adapter/``: the change for the *original* model, of twice the rank, if the adapter
      started as the low-rank part of a decomposition.

    They take the place of those of another run whose checkpoints are gone.

    Args:
      config: The run.
      quiet: Print nothing.

    Returns:
      The result.

    Raises:
      FloatingPointError: At a loss or an adapter that is not finite, before it is written.
      ValueError: For a configuration that does not fit the model, the data, the devices, the saved
        base or the checkpoint.
    """
    output = config.output
    mesh = _mesh(config)
    saved = _saved_base(config)
    start = load_start(saved or config.model, config.dtype, remat=config.remat)
    data = load_data(config, start)
    rows, held_out = data.rows, data.held_out
    head = _head(config, start, data.classes)
    output.mkdir(parents=True, exist_ok=True)
    if saved is None:
        start = _prepare(config, start)
    if head is not None and (path := _adapted_experts(start.adapter)):
        raise ValueError(
            f"a classifier is saved in PEFT's format, which has no place for {path!r}; leave out "
            "experts: method 'lora' or 'qlora' with --targets '*self_attn*kernel'"
        )
    base = start.base if mesh is None else shard_base(start.base, mesh)
    optimizer = config.optimizer()
    step = make_step(_objective(config, start), optimizer, mesh)
    # A copy, because the state is donated.
    trained = Trained(jax.tree.map(jnp.copy, start.adapter), head)
    state = TrainState(trained, optimizer.init(trained))
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = jax.device_put(state, everywhere)
    checkpoints = Checkpoints(
        output / "checkpoints", _identity(config, data), config.checkpoint_every
    )
    state, done = checkpoints.restore(state)
    if not quiet:
        _describe(start, rows, held_out, done)
    rates = config.learning_rates()
    nonfinite = jax.jit(first_nonfinite)
    losses: dict[int, float] = {}
    evaluations: dict[int, dict[str, float]] = {}

    def evaluate(number: int) -> dict[str, float]:
        if held_out is None:
            return {}
        found = evaluations[number] = _evaluate(config, step, state.trained, base, held_out)
        _check_finite(number, "loss on what is held out", found["eval_loss"])
        return found

    with MetricsWriter(output, done, quiet=quiet) as metrics:
        if done == 0 and (record := evaluate(0)):
            metrics.write({"step": 0, **record})
        for number in range(done + 1, config.steps + 1):
            began = time.perf_counter()
            part = rows.batch(config.seed, number - 1, config.batch_size)
            state, values = step.update(state, base, _on_device(part, config.accumulate))
            loss = losses[number] = float(values["loss"])
            _check_finite(number, "loss", loss)
            if (bad := int(nonfinite(state.trained))) >= 0:
                _check_finite(number, leaf_name(state.trained, bad), math.nan)
            seconds = time.perf_counter() - began
            record = {
                "loss": loss,
                "gradient_norm": float(values["gradient_norm"]),
                "learning_rate": float(rates(number - 1)),
                "tokens_per_second": float((part.segments > 0).sum() / seconds),
            }
            if number % config.eval_every == 0 or number == config.steps:
                record |= evaluate(number)
            metrics.write({"step": number, **record})
            if number == config.steps:
                _discard_results(output)  # first, as a run with its last checkpoint keeps them
            checkpoints.save(number, state, force=number == config.steps)
    checkpoints.close()
    result = FinetuneResult(start, state.trained, data.classes, losses, evaluations)
    _save_results(config, result)
    return result


def _mesh(config: FinetuneConfig) -> jax.sharding.Mesh | None:
    """The devices by rows and by parts of the base; None for one."""
    shape = (config.data_parallel, config.model_parallel)
    if math.prod(shape) == 1:
        return None
    if math.prod(shape) > jax.device_count():
        raise ValueError(
            f"data_parallel={shape[0]} times model_parallel={shape[1]} is more than the "
            f"{jax.device_count()} devices that JAX has; lower one"
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)


def _saved_base(config: FinetuneConfig) -> Path | None:
    """The base that an earlier start of the same run compressed, if there is one.

    Raises:
      ValueError: If it was made otherwise than this configuration asks for.
    """
    saved, record = config.output / "base", config.output / "base.json"
    if not saved.is_dir():
        return None
    fix = f"use another --output, or delete {saved}"
    if not record.is_file():
        raise ValueError(f"{saved} has no {record.name} that says what it was made from; {fix}")
    found = json.loads(record.read_text(encoding="utf-8"))
    differing = differences(found, _base_identity(config), record.name)
    if differing:
        raise ValueError(f"cannot go on with {saved}: {differing}; {fix}")
    return saved


def _base_identity(config: FinetuneConfig) -> dict[str, Any]:
    """What determines the base and the adapter that it starts with, in terms of JSON."""
    names = ("model", "method", "rank", "targets", "bits", "group_size", "rounds", "adapter")
    values = {name: getattr(config, name) for name in (*names, "dtype", "seed")}
    return json.loads(json.dumps(values | {"recipe": _recipe_text(config)}))


def _recipe_text(config: FinetuneConfig) -> str | None:
    return None if config.recipe is None else config.recipe.read_text(encoding="utf-8")


def _prepare(config: FinetuneConfig, start: Start) -> Start:
    """The base and adapter of the run; what is compressed is kept for resumption."""
    start = prepare(
        start,
        config.method,
        rank=config.rank,
        recipe=config.rules(),
        targets=config.targets,
        key=jax.random.key(config.seed),
        rounds=config.rounds,
        peft=config.adapter,
    )
    if config.method != "lora":
        # First, so that a base is never there without it.
        record = json.dumps(_base_identity(config), indent=2) + "\n"
        replace_file(config.output / "base.json", record)
        params = lora.attach(start.base, start.adapter)
        lutjax.save(config.output / "base", params, start.model.config, start.tokenizer)
    return start


def _objective(config: FinetuneConfig, start: Start) -> Objective:
    if config.task == "language":
        return next_token(lutjax.lift(start.model.apply, strict=True))
    return classification(lutjax.lift(hidden_states(start.model), strict=True))


def _head(config: FinetuneConfig, start: Start, classes: tuple[Any, ...]) -> jax.Array | None:
    """That of the adapter to go on with, or zeros.

    The gradient of a head that is the only layer of its kind needs no symmetry broken.
    """
    if not classes:
        return None
    shape = (start.model.config.hidden_size, len(classes))
    head = None if config.adapter is None else load_head(config.adapter)
    if head is None:
        return jnp.zeros(shape)
    if head.shape != shape:
        raise ValueError(
            f"the head of adapter={config.adapter} is for {head.shape[0]} features and "
            f"{head.shape[1]} classes; the model has {shape[0]} and the data {shape[1]}: "
            f"{list(classes)!r:.80}; give the adapter's own model and labels"
        )
    return head


def _on_device(rows: Rows, parts: int) -> Batch:
    arrays = (rows.tokens, rows.segments, rows.targets)
    return Batch(*(jnp.asarray(a).reshape(parts, -1, a.shape[-1]) for a in arrays))


def _evaluate(
    config: FinetuneConfig, step: Step, trained: Trained, base: Any, held_out: Rows
) -> dict[str, float]:
    """Means over all held-out rows."""
    loss = count = correct = 0.0
    size = config.batch_size
    for begin in range(0, len(held_out), size):
        index = np.arange(begin, begin + size)
        part = held_out.take(index % len(held_out))
        part.targets[index >= len(held_out)] = NOTHING  # rows that only fill the batch
        sums = step.evaluate(trained, base, _on_device(part, config.accumulate))
        loss += float(sums.loss)
        count += float(sums.targets)
        correct += float(sums.correct)
    if config.task == "classification":
        return {"eval_loss": loss / count, "eval_accuracy": correct / count}
    return {"eval_loss": loss / count, "eval_perplexity": perplexity(loss / count)}


def _identity(config: FinetuneConfig, data: Data) -> dict[str, Any]:
    """What must be equal for a run to be resumed, in terms of JSON."""
    free = ("output", "eval_data", "eval_fraction", "eval_every", "checkpoint_every", "data")
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    values["recipe"] = _recipe_text(config)
    found = {"rows": data.rows.fingerprint, "classes": data.classes}
    return json.loads(json.dumps(values | found))


def _check_finite(step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        fix = "lower the learning rate" if step else "the model or the data is not sound"
        raise FloatingPointError(f"step {step}: the {what} is {value}; {fix}")


def _discard_results(output: Path) -> None:
    """Removes results of another run whose checkpoints are gone."""
    for name in ("adapter", "model", "delta_adapter"):
        discard(output / name)
    (output / "classes.json").unlink(missing_ok=True)


def _save_results(config: FinetuneConfig, result: FinetuneResult) -> None:
    """Writes what is not there yet: a finished run that is started again changes nothing."""
    start, output = result.start, config.output
    adapter, head = jax.device_get(result.trained)
    base_is_compressed = has_compressed(start.base)
    began_at_zero = all(not np.asarray(part.right).any() for part in start.adapter.values())
    decomposed = config.adapter is None and not began_at_zero
    for_peft = _adapted_experts(adapter) is None
    name: str | None = str(output / "base")
    original: str | None = config.model
    if config.method == "lora":
        # PEFT cannot load a compressed model, and the original of a decomposed one is not known.
        name = None if base_is_compressed or decomposed else config.model
        original = None
    if for_peft and not (output / "adapter").exists():
        save_peft(output / "adapter", adapter, base_model=name, head=head)
    if result.classes:
        replace_file(output / "classes.json", json.dumps(result.classes) + "\n")
    if (base_is_compressed or not for_peft) and not (output / "model").exists():
        params = lora.attach(start.base, jax.device_put(adapter))
        lutjax.save(output / "model", params, start.model.config, start.tokenizer)
    if decomposed and for_peft and not (output / "delta_adapter").exists():
        delta = lora.difference(adapter, start.adapter)
        save_peft(output / "delta_adapter", delta, base_model=original, head=head)


def _adapted_experts(adapter: Mapping[str, LowRankArray]) -> str | None:
    """The path of a stack of experts that has adapters; None if there is none."""
    return next((path for path, part in adapter.items() if part.batch_shape), None)


def _describe(start: Start, rows: Rows, held_out: Rows | None, done: int) -> None:
    from lutjax.arrays import format_bytes

    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(start.adapter))
    frozen = sum(leaf.nbytes for leaf in jax.tree.leaves(start.base))
    used = (rows.segments > 0).mean()
    print(
        f"base {format_bytes(frozen)}, adapter {format_bytes(trained)} in "
        f"{len(start.adapter)} matrices; {len(rows)} rows, {used:.1%} full, "
        f"{0 if held_out is None else len(held_out)} held out; from step {done}",
        flush=True,
    )


def main() -> int:
    """The command line; exit code 2 for bad input."""
    import tyro

    return exit_code(
        "train.finetune",
        lambda: finetune(tyro.cli(FinetuneConfig, prog="python -m train.finetune")),
    )


if __name__ == "__main__":
    sys.exit(main())
