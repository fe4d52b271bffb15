"""The configuration of a finetuning run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import optax

import lutjax
from train.base_model import METHODS, Method

_UNUSED: dict[Method, tuple[str, ...]] = {
    "lora": ("bits", "group_size", "rounds", "recipe"),
    "qlora": ("rounds",),
    "lq-lora": ("targets", "adapter"),
    "loftq": ("targets", "adapter"),
}
"""Options that would have no effect."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a causal language model, or a classifier, with an adapter on a frozen base.

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
    task: Literal["language", "classification"] = "language"
    """language: predict tokens; classification: predict the label of a text at its last token."""
    text_fields: tuple[str, ...] = ("text",)
    """Fields of a record that make its text (classification)."""
    label_field: str = "label"
    """Field of its class, a number or a name (classification)."""
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
    rounds: int | None = None
    """Most rounds of lq-lora and loftq, by default 100 and 5; the first few gain the most."""
    recipe: Path | None = None
    """JSON file with a rule for each matrix, instead of the two above; see lutjax allocate."""
    adapter: str | None = None
    """Directory of a PEFT adapter, and a classifier's head, to go on with (lora and qlora)."""
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
    """Largest norm of a gradient; inf for any."""
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
        if self.task not in ("language", "classification"):
            raise ValueError(f"task={self.task!r} is unknown; use language or classification")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; use one of {', '.join(METHODS)}")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _UNUSED[self.method] and value != field.default:
                raise ValueError(
                    f"{name}={value} has no meaning with method={self.method!r}; leave it out or "
                    f"use another method"
                )
            if name in ("bits", "group_size") and self.recipe and value != field.default:
                raise ValueError(f"{name}={value} has no meaning beside recipe={self.recipe}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite")
        if not self.clip > 0:
            raise ValueError(
                f"clip={self.clip} would make every update zero; it must be above 0 (inf: no limit)"
            )
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
