"""Test-time training of SmolLM2-135M-Instruct on small few-shot tasks, against answers in context.

    python benchmarks/ttt.py [--bits 4] [--steps 24] [--output DIR]

Every task is a rule shown by a few demonstrations: words are reordered, cut, repeated; small grids
are turned and recoloured. They are made here, from a seed. Writes ttt.json and
ttt.md, and says how long an update of one task takes alone and among others.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.io import demo_model_path
from train.base_model import Start
from train.lora_step import Batch, make_step, next_token, state_for_each, update_each
from train.solver import solve
from train.tasks import Pair, Query, Task, to_grid
from train.ttt import load_base, summary
from train.ttt_config import TTTConfig

WORDS = (
    *("apple", "river", "stone", "cloud", "tiger", "piano", "green", "seven", "table", "light"),
    *("bread", "ocean", "chair", "horse", "night", "snow", "paper", "glass", "tree", "gold"),
    *("fish", "moon", "king", "rain", "fire", "bird", "lake", "star", "wolf", "rose", "corn"),
    "milk",
)
WORD_RULES: dict[str, Callable[[list[str]], str]] = {
    "first": lambda w: w[0],
    "last": lambda w: w[-1],
    "reversed": lambda w: " ".join(w[::-1]),
    "ends swapped": lambda w: " ".join([w[-1], *w[1:-1], w[0]]),
    "without the first": lambda w: " ".join(w[1:]),
    "last one twice": lambda w: " ".join([*w, w[-1]]),
    "second in capitals": lambda w: " ".join([w[0], w[1].upper(), *w[2:]]),
    "commas": lambda w: ", ".join(w),
}
GRID_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored": lambda g: g[:, ::-1],
    "first row everywhere": lambda g: np.broadcast_to(g[:1], g.shape),
    "twice as wide": lambda g: np.concatenate([g, g], axis=1),
    "first and last row swapped": lambda g: np.concatenate([g[-1:], g[1:-1], g[:1]]),
    "colours 1 and 2 swapped": lambda g: np.where((g == 1) | (g == 2), 3 - g, g),
    "without the last row": lambda g: g[:-1],
}


def word_pair(rule: Callable[[list[str]], str], rng: np.random.Generator) -> Pair:
    words = [WORDS[i] for i in rng.choice(len(WORDS), rng.integers(3, 5), replace=False)]
    return Pair(" ".join(words), rule(words))


def grid_pair(rule: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator) -> Pair:
    grid = rng.integers(0, 10, (3, 3))
    return Pair(to_grid(grid.tolist()), to_grid(rule(grid).tolist()))


def make_tasks(demonstrations: int, queries: int, seed: int) -> dict[str, list[Task]]:
    """Tasks by kind, one of each rule."""

    def one(name: str, draw: Callable[[np.random.Generator], Pair], queries: int) -> Task:
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        pairs: dict[Any, Pair] = {}  # by input: none is asked that was shown
        while len(pairs) < demonstrations + queries:
            pair = draw(rng)
            pairs.setdefault(pair.input, pair)
        found = list(pairs.values())
        asked = tuple(Query(*pair) for pair in found[demonstrations:])
        return Task(name, tuple(found[:demonstrations]), asked)

    return {
        "words": [
            one(name, functools.partial(word_pair, rule), queries)
            for name, rule in WORD_RULES.items()
        ],
        "grids": [
            one(name, functools.partial(grid_pair, rule), -(-queries // 2))
            for name, rule in GRID_RULES.items()
        ],
    }


def run(config: TTTConfig, start: Start, tasks: Sequence[Task]) -> dict[str, Any]:
    """How many queries of each task were answered right, and how long that took."""
    began = time.perf_counter()
    found = {result.name: result for result in solve(config, start, tasks, progress=True)}
    seconds = time.perf_counter() - began
    results = [found[task.name] for task in tasks]
    return summary(results) | {
        "seconds": seconds,
        "by_rule": {r.name: sum(place == 0 for place in r.right) for r in results},
    }


def update_seconds(config: TTTConfig, start: Start, tasks: int) -> float:
    """How long an update of so many tasks takes, each with one row of 192 tokens; a median of 5."""
    optimizer = config.optimizer()
    update = update_each(make_step(next_token(lutjax.lift(start.model.apply)), optimizer))
    state = state_for_each(start.adapter, optimizer, tasks)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, start.model.config.vocab_size, (tasks, 1, 1, 192))
    at = np.broadcast_to(np.arange(96, 144), (tasks, 1, 1, 48))
    fields = (tokens, np.ones_like(tokens), tokens[..., 97:145], at)
    batch = Batch(*(jnp.asarray(field, jnp.int32) for field in fields))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, start.base, batch))
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))  # the first one compiles


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| tasks | answers | right at the first attempt | seconds, with compiling |",
        "|---|---|---|---|",
    ]
    for row in rows:
        right = f"{row['right_at_first']} of {row['queries']}"
        lines.append(f"| {row['tasks_of']} | {row['name']} | {right} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--demonstrations", type=int, default=8)
    parser.add_argument("--queries", type=int, default=8, help="of a task of words; half for grids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    trained = TTTConfig(
        model=str(demo_model_path()),
        tasks=Path(),
        output=Path(),
        bits=arguments.bits,
        rank=arguments.rank,
        steps=arguments.steps,
        batch_size=1,
        learning_rate=arguments.learning_rate,
        orders=1,
        symmetries=False,
    )
    start = load_base(trained)
    tasks = make_tasks(arguments.demonstrations, arguments.queries, arguments.seed)
    in_context = dataclasses.replace(trained, steps=0)
    variants = {
        "words": {"in context": in_context, "test-time training": trained},
        "grids": {
            "in context": in_context,
            "in context, eight positions vote": dataclasses.replace(in_context, symmetries=True),
            "test-time training": trained,
            "test-time training, eight positions vote": dataclasses.replace(
                trained, symmetries=True
            ),
        },
    }
    rows: list[dict[str, Any]] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"jax": jax.__version__, "options": vars(arguments) | {"output": None}}
    for kind, configs in variants.items():
        for name, config in configs.items():
            row = {"tasks_of": kind, "name": name} | run(config, start, tasks[kind])
            rows.append(row)
            tqdm.write(markdown(rows).splitlines()[-1])
    data["rows"] = rows
    data["update_seconds"] = {n: update_seconds(trained, start, n) for n in (1, 8)}
    print(data["update_seconds"])
    (arguments.output / "ttt.json").write_text(json.dumps(data, indent=1) + "\n")
    (arguments.output / "ttt.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
