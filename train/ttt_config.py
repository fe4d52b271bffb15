"""The configuration of a run of test-time training."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class TTTConfig:
    """Answer few-shot tasks, after training an adapter for each on the task's own demonstrations.

    Tasks are in the format of ARC, with grids or strings. Many adapters are trained at once, on one
    base, which may be quantised. For example:

    python -m train.ttt --model smol --tasks arc/data/evaluation --output run --bits 4

    Run the same command again to go on after an interruption.
    """

    model: str
    """Directory, .gguf file or hub id."""
    tasks: Path
    """Directory of .json files with one task each, or a .json file that maps names to tasks."""
    output: Path
    """Directory of predictions.jsonl and summary.json; made if it does not exist."""
    bits: int | None = None
    """Quantise the base to so many bits a weight; by default it stays as it is."""
    group_size: int = 64
    """Weights that share a scale."""
    adapter: str | None = None
    """Directory of a PEFT adapter that every task starts with, instead of a new one."""
    rank: int = 64
    """Inner size of new adapters."""
    targets: tuple[str, ...] = ("*_proj/kernel",)
    """Paths or globs of the matrices with a new adapter."""
    steps: int = 40
    """Updates for each task; 0 for answers in context only."""
    batch_size: int = 2
    """Variants of a task in an update, one after the other."""
    learning_rate: float = 1e-4
    """AdamW's; it falls to zero linearly."""
    clip: float = 1.0
    """Largest norm of a gradient; inf for any."""
    orders: int = 2
    """Orders of the demonstrations in which a query is asked."""
    symmetries: bool = True
    """Ask about grids in all eight positions, and vote."""
    attempts: int = 2
    """Answers to keep for each query, the best first."""
    instances: int = 8
    """Most tasks at once."""
    tokens_at_once: int = 8192
    """Tokens of all tasks at once: of long ones there are fewer, and fewer of their prompts."""
    sequence_length: int = 2048
    """Most tokens of a task's demonstrations, a query and an answer, and of its demonstrations as
    they are trained on; longer ones are left out."""
    max_new_tokens: int | None = None
    """Of an answer; by default twice the longest output of the demonstrations."""
    limit: int | None = None
    """Take the first so many tasks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and dense weights; adapters and their optimiser are float32."""
    remat: bool = False
    """Compute each block's activations again in the backward pass, for long tasks."""
    seed: int = 0
    """Of adapters, variants and orders."""

    def __post_init__(self) -> None:
        """Checks values that would fail late or silently."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name not in ("steps", "seed"))
            if type(value) is int and value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be above 0 (inf: no limit)")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipping and the schedule."""
        schedule = optax.linear_schedule(self.learning_rate, 0.0, max(1, self.steps))
        return optax.chain(
            optax.clip_by_global_norm(self.clip), optax.adamw(schedule, weight_decay=0.0)
        )
