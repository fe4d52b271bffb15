"""What pretraining methods cost on this device: time and memory of a step, and of a refresh.

    python benchmarks/optimizers.py [--model 7m] [--rounds 15] [--output benchmarks/results]
    python benchmarks/optimizers.py --model 130m --batch-size 64 --length 256 --rank 256  # a GPU

Writes ``optimizers-<device>.json`` and ``.md``. Methods take turns, so that whatever else the
machine does hits all of them; a ratio to Adam is the median of the ratios within a round. Memory is
the compiler's account of a step: arguments, results that do not overwrite them, and temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.linear_maps import SVD, RandomizedSVD
from train.llama_configs import LLAMA
from train.pretrain import PretrainConfig, build

NEVER = 1_000_000
VARIANTS = {
    "adam": ("adam", NEVER),
    "galore": ("galore", NEVER),
    "galore, a refresh every step": ("galore", 1),
}
"""Name: method and steps between refreshes. The first step always refreshes; it is not timed."""
OTHERS = ("galore_8bit", "flora", "semi_orthogonal", "one_sided_lora")


@dataclasses.dataclass
class Run:
    """A compiled training step, its state, its times so far and its bytes."""

    step: Callable[..., Any]
    state: Any
    tokens: jax.Array
    bytes: int
    number: int = 0

    def seconds(self) -> float:
        """Takes a step."""
        start = time.perf_counter()
        self.state, _ = self.step(self.state, jnp.asarray(self.number), self.tokens)
        jax.block_until_ready(self.state)
        self.number += 1
        return time.perf_counter() - start


def prepare(config: PretrainConfig) -> Run:
    """Compiles a step and takes the first two."""
    training = build(config)
    state = jax.jit(training.init)(jax.random.key(0))
    shape = (config.batch_size, config.sequence_length + 1)
    vocabulary = LLAMA[config.model].vocab_size
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, shape), jnp.int32)
    step = jax.jit(training.step, donate_argnums=0).lower(state, jnp.asarray(0), tokens).compile()
    memory = step.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    run = Run(step, state, tokens, used)
    for _ in range(2):
        run.seconds()
    return run


def step_costs(base: PretrainConfig, others: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """By variant: seconds a step, its ratio to Adam, tokens a second, bytes."""
    runs = {}
    for name, (method, every) in (VARIANTS | {name: (name, NEVER) for name in others}).items():
        print(f"compiling {name}", flush=True)
        runs[name] = prepare(dataclasses.replace(base, method=method, refresh_every=every))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run.seconds())
    return {
        name: {
            "seconds": statistics.median(values),
            "of_adam": statistics.median(a / b for a, b in zip(values, times["adam"], strict=True)),
            "tokens_per_second": base.batch_size * base.sequence_length / statistics.median(values),
            "bytes": runs[name].bytes,
        }
        for name, values in times.items()
    }


def refresh_seconds(size: int, rank: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved timings of a refresh of one `size x size` weight."""
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    functions = {}
    for name, map_ in (("svd", SVD(rank)), ("randomized_svd", RandomizedSVD(rank))):
        bound = map_.init(jax.random.key(0), gradient.shape)
        functions[name] = jax.jit(
            lambda g, map_=map_, bound=bound: map_.refresh(bound, jax.random.key(1), gradient=g)
        )
        jax.block_until_ready(functions[name](gradient))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(gradient))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(result: dict[str, Any]) -> str:
    """The result as markdown."""
    run = result["run"]
    lines = [
        f"# Cost of pretraining methods: {result['device']}",
        "",
        f"`{run['model']}`, {run['batch_size']} x {run['length']} tokens a step, rank "
        f"{run['rank']}, jax {result['jax']}, load average {result['load_average']:.1f} on "
        f"{result['cores']} cores, {run['rounds']} rounds. Full Adam is 1.",
        "",
        "| method | ms a step | of Adam | tokens/s | MB |",
        "|---|---|---|---|---|",
    ]
    for name, cost in result["steps"].items():
        lines.append(
            f"| {name} | {1e3 * cost['seconds']:.1f} | {cost['of_adam']:.3f} "
            f"| {cost['tokens_per_second']:.0f} | {cost['bytes'] / 1e6:.0f} |"
        )
    refresh = result["refresh"]
    lines += [
        "",
        f"GaLore with a refresh every {run['refresh_every']} steps: "
        f"**{result['galore_amortised_of_adam']:.3f}** of Adam.",
        "",
        f"Refresh of a {run['size']} x {run['size']} weight at rank {run['refresh_rank']}: "
        f"{refresh['svd']:.2f} s by SVD, {refresh['randomized_svd']:.2f} s by randomised SVD, "
        f"**{refresh['svd'] / refresh['randomized_svd']:.1f} times** faster.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7m", choices=sorted(LLAMA))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=80)
    parser.add_argument("--refresh-every", type=int, default=200)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--refresh-rank", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--methods", nargs="*", choices=OTHERS, default=OTHERS, help="besides Adam and GaLore"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    base = PretrainConfig(
        text=(),
        model=arguments.model,
        batch_size=arguments.batch_size,
        sequence_length=arguments.length,
        rank=arguments.rank,
    )
    load = os.getloadavg()[0]
    steps = step_costs(base, arguments.methods, arguments.rounds)
    every = arguments.refresh_every
    plain, refreshing = steps["galore"], steps["galore, a refresh every step"]
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load_average": load,
        "run": {k: v for k, v in vars(arguments).items() if k != "output"},
        "steps": steps,
        "galore_amortised_of_adam": ((every - 1) * plain["of_adam"] + refreshing["of_adam"])
        / every,
        "refresh": refresh_seconds(arguments.size, arguments.refresh_rank, 3),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"optimizers-{result['device'].lower().replace(' ', '-')}"
    (arguments.output / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (arguments.output / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
