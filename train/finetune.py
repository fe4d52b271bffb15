"""Finetuning of low-rank adapters on a frozen base: ``python -m train.finetune --help``."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lutjax
from lutjax.adapters import lora
from lutjax.arrays import LowRankArray, is_compressed
from lutjax.io import save_peft
from train.base_model import METHODS, Method, Start, load_start, prepare, shard_base
from train.checkpoints import Checkpoints
from train.examples import Rows, load_rows
from train.lora_step import Batch, Step, TrainState, make_step
from train.metrics import MetricsWriter, perplexity


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a causal language model with a low-rank adapter on a frozen base.

    For example:

    python -m train.finetune --model smol --data chats.jsonl --output run --method lq-lora --bits 3

    Run the same command again to go on after an interruption.
    """

    model: str
    """Directory, .gguf file or hub id; a decomposed checkpoint goes on with its low-rank parts."""
    data: str
    """.json, .jsonl, .parquet or .csv file with messages, prompt and completion, or text; any other
    file is plain text; or dataset:config:split of the Hugging Face hub."""
    output: Path
    """Directory of checkpoints, metrics and results; made if it does not exist."""
    method: Method = "lora"
    """lora: the base as it is; qlora: quantised; lq-lora, loftq: quantised plus low-rank."""
    rank: int = 16
    """Inner size of the adapter."""
    targets: tuple[str, ...] = ("*_proj/kernel",)
    """Paths or globs of the matrices with an adapter (lora and qlora)."""
    bits: int = 4
    """Bits of a code of the quantised base."""
    group_size: int = 64
    """Weights that share a scale."""
    recipe: Path | None = None
    """JSON file with a rule for each matrix, instead of the two above; see lutjax allocate."""
    adapter: str | None = None
    """Directory of a PEFT adapter to go on with (lora and qlora)."""
    eval_data: str | None = None
    """Data to evaluate on; by default the last part of the training data."""
    eval_fraction: float = 0.05
    """That part; 0 for no evaluation."""
    sequence_length: int = 512
    """Tokens of a packed row; longer texts are cut."""
    batch_size: int = 8
    """Rows in an update."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other on each device."""
    steps: int = 100
    """Updates."""
    learning_rate: float = 2e-4
    """Peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up; cosine and linear fall to zero."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and dense weights; the adapter and its optimiser are float32."""
    remat: bool = False
    """Compute each block's activations again in the backward pass, for long sequences."""
    data_parallel: int = 1
    """Devices that share a batch."""
    model_parallel: int = 1
    """Devices that share the base."""
    seed: int = 0
    """Of the adapter and of the order of the rows."""
    eval_every: int = 50
    """Steps between evaluations; one is at the start and one at the end."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Checks values that would fail late or silently."""
        for name in ("rank", "sequence_length", "batch_size", "accumulate", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_every", "checkpoint_every", "data_parallel", "model_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; use one of {', '.join(METHODS)}")
        parts = self.accumulate * self.data_parallel
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into accumulate={self.accumulate} "
                f"parts on data_parallel={self.data_parallel} devices"
            )
        for name in ("eval_fraction", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipping and the schedule."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.learning_rates(), weight_decay=self.weight_decay),
        )

    def learning_rates(self) -> optax.Schedule:
        """The learning rate by step."""
        rise = math.ceil(self.warmup * self.steps)
        fall = max(1, self.steps - rise)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, fall),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, fall),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        # Not from 0: the first update would be lost.
        first = self.learning_rate / (rise + 1)
        warmup = optax.linear_schedule(first, self.learning_rate, max(1, rise))
        return optax.join_schedules([warmup, after], [rise])

    def rules(self) -> lutjax.Recipe:
        """How the base is quantised."""
        if self.recipe is not None:
            return lutjax.Recipe.load(self.recipe)
        return lutjax.Recipe.uniform(self.bits, self.group_size)


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run ends with.

    Attributes:
      start: The model, the base, and the adapter before training.
      adapter: The adapter after training.
      losses: Training loss by step, of the steps since the start or the resumption.
      evaluations: Held-out loss by step.
    """

    start: Start
    adapter: dict[str, LowRankArray]
    losses: dict[int, float]
    evaluations: dict[int, float]

    @property
    def params(self) -> Any:
        """Base and trained adapter."""
        return lora.attach(self.start.base, self.adapter)


def finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneResult:
    """Trains, going on from the output directory's last checkpoint if there is one.

    The output directory gets ``metrics.jsonl``, ``checkpoints/``, the base as it was at the start
    if the run compressed it (``base/``), and at the end

    * ``adapter/``: the adapter for its base, in PEFT's format;
    * ``model/``: base and adapter together for :func:`lutjax.load`, if the base is compressed;
    * ``delta_adapter/``: the change for the *original* model, of twice the rank, if the adapter did
      not start at zero.

    Args:
      config: The run.
      quiet: Print nothing.

    Returns:
      The result.

    Raises:
      FloatingPointError: At a loss that is not finite.
      ValueError: For a configuration that does not fit the model, the data or the checkpoint.
    """
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    start = _start(config)
    rows, held_out = _data(config, start)
    mesh = None
    base = start.base
    if config.data_parallel * config.model_parallel > 1:
        mesh = jax.make_mesh(
            (config.data_parallel, config.model_parallel),
            ("data", "model"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )
        base = shard_base(base, mesh)
    optimizer = config.optimizer()
    step = make_step(lutjax.lift(start.model.apply, strict=True), optimizer, mesh)
    # A copy, because the state is donated.
    adapter = jax.tree.map(jnp.copy, start.adapter)
    state = TrainState(adapter, optimizer.init(adapter))
    if mesh is not None:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        state = jax.device_put(state, everywhere)
    checkpoints = Checkpoints(
        output / "checkpoints", _identity(config, rows), config.checkpoint_every
    )
    state, done = checkpoints.restore(state)
    if not quiet:
        _describe(start, rows, held_out, done)
    rates = config.learning_rates()
    losses: dict[int, float] = {}
    evaluations: dict[int, float] = {}

    def evaluate(number: int) -> dict[str, float]:
        if held_out is None:
            return {}
        loss = evaluations[number] = _evaluate(config, step, state.adapter, base, held_out)
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss)}

    with MetricsWriter(output, done, quiet=quiet) as metrics:
        if done == 0 and (record := evaluate(0)):
            metrics.write({"step": 0, **record})
        for number in range(done + 1, config.steps + 1):
            began = time.perf_counter()
            part = rows.batch(config.seed, number - 1, config.batch_size)
            state, values = step.update(state, base, _on_device(part, config.accumulate))
            loss = losses[number] = float(values["loss"])
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"step {number}: the loss is {loss}; lower the learning rate"
                )
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
            checkpoints.save(number, state, force=number == config.steps)
    checkpoints.close()
    result = FinetuneResult(start, state.adapter, losses, evaluations)
    _save_results(config, result)
    return result


def _start(config: FinetuneConfig) -> Start:
    """The model with its base and adapter; what was compressed once is kept for resumption."""
    saved = config.output / "base"
    if saved.is_dir():
        return load_start(saved, config.dtype, remat=config.remat)
    start = prepare(
        load_start(config.model, config.dtype, remat=config.remat),
        config.method,
        rank=config.rank,
        recipe=config.rules(),
        targets=config.targets,
        key=jax.random.key(config.seed),
        peft=config.adapter,
    )
    if config.method != "lora":
        params = lora.attach(start.base, start.adapter)
        lutjax.save(saved, params, start.model.config, start.tokenizer)
    return start


def _data(config: FinetuneConfig, start: Start) -> tuple[Rows, Rows | None]:
    tokenizer, length = start.tokenizer, config.sequence_length
    longest = start.model.config.max_position_embeddings
    if length > longest:
        raise ValueError(
            f"sequence_length={length} is beyond the model's {longest} positions; shorten it"
        )
    if config.eval_data is None:
        return load_rows(config.data, tokenizer, length, config.eval_fraction)
    return (
        load_rows(config.data, tokenizer, length)[0],
        load_rows(config.eval_data, tokenizer, length)[0],
    )


def _on_device(rows: Rows, parts: int) -> Batch:
    return Batch(
        *(
            jnp.asarray(a).reshape(parts, -1, a.shape[-1])
            for a in (rows.tokens, rows.segments, rows.learnt)
        )
    )


def _evaluate(config: FinetuneConfig, step: Step, adapter: Any, base: Any, held_out: Rows) -> float:
    """Mean loss over the learnt tokens of all held-out rows, in nats."""
    total = count = 0.0
    size = config.batch_size
    for begin in range(0, len(held_out), size):
        index = np.arange(begin, begin + size)
        part = held_out.take(index % len(held_out))
        part.learnt[index >= len(held_out)] = False  # rows that only fill the batch
        loss, learnt = step.evaluate(adapter, base, _on_device(part, config.accumulate))
        total += float(loss)
        count += float(learnt)
    return total / count


def _identity(config: FinetuneConfig, rows: Rows) -> dict[str, Any]:
    """What must be equal for a run to be resumed, in terms of JSON."""
    free = ("output", "eval_data", "eval_fraction", "eval_every", "checkpoint_every", "data")
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    values["recipe"] = None if config.recipe is None else config.recipe.read_text()
    return json.loads(json.dumps(values | {"rows": rows.fingerprint}))


def _save_results(config: FinetuneConfig, result: FinetuneResult) -> None:
    """Writes what is not there yet: a finished run that is started again changes nothing."""
    start, output = result.start, config.output
    adapter = jax.device_get(result.adapter)
    base_is_compressed = any(map(is_compressed, jax.tree.leaves(start.base, is_leaf=is_compressed)))
    name = str(output / "base") if config.method != "lora" else config.model
    if not (output / "adapter").exists():
        save_peft(output / "adapter", adapter, base_model=name)
    if base_is_compressed and not (output / "model").exists():
        params = lora.attach(start.base, jax.device_put(adapter))
        lutjax.save(output / "model", params, start.model.config, start.tokenizer)
    began_at_zero = all(not np.asarray(part.right).any() for part in start.adapter.values())
    if not began_at_zero and not (output / "delta_adapter").exists():
        delta = lora.difference(adapter, start.adapter)
        save_peft(output / "delta_adapter", delta, base_model=config.model)


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

    try:
        finetune(tyro.cli(FinetuneConfig, prog="python -m train.finetune"))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"train.finetune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
