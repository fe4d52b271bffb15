"""What projection costs: time of a step against Adam, and of a refresh; ratios in one process.

python benchmarks/optimizers.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lutjax.linear_maps import SVD, RandomizedSVD, matching
from lutjax.models import Decoder
from lutjax.optim import flora, galore
from train.llama_configs import LLAMA
from train.methods import PROJECTED
from train.pretrain import next_token_loss


def seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def refresh_times(size: int, rank: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved timings of a refresh of one `size x size` weight."""
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    functions = {}
    for name, map_ in (("svd", SVD(rank)), ("randomized_svd", RandomizedSVD(rank))):
        bound = map_.init(jax.random.key(0), gradient.shape)
        functions[name] = jax.jit(
            lambda g, map_=map_, bound=bound: map_.refresh(bound, jax.random.key(1), gradient=g)
        )
        seconds(functions[name], gradient)  # compiles
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, gradient))
    return {name: statistics.median(values) for name, values in times.items()}


def step_times(model: str, batch: int, length: int, rank: int, rounds: int) -> dict[str, float]:
    """Medians of interleaved timings of a training step, and of one with a refresh."""
    decoder = Decoder(dataclasses.replace(LLAMA[model], scan_layers=True))
    tokens = jnp.zeros((batch, length + 1), jnp.int32)
    params = decoder.init(jax.random.key(0), tokens)["params"]
    where = matching(*PROJECTED)
    optimizers = {
        "adam": optax.adam(1e-3),
        "galore": galore(1e-3, rank, 1_000_000, weight_dimension_numbers=where),
        "galore, with a refresh": galore(1e-3, rank, 1, weight_dimension_numbers=where),
        "flora": flora(1e-3, rank, 1_000_000, weight_dimension_numbers=where),
    }
    steps, states = {}, {}
    for name, optimizer in optimizers.items():

        @jax.jit
        def step(params, state, optimizer=optimizer):
            gradients = jax.grad(lambda p: next_token_loss(decoder.apply, p, tokens))(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        _, states[name] = step(params, optimizer.init(params))  # past the first refresh
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, params, states[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="1m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--refresh-every", type=int, default=200)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--refresh-rank", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    steps = step_times(
        arguments.model, arguments.batch, arguments.length, arguments.rank, arguments.rounds
    )
    adam = steps["adam"]
    for name, value in steps.items():
        print(f"{name}: {1e3 * value:.1f} ms a step, {value / adam:.3f} of Adam", flush=True)
    every = arguments.refresh_every
    amortised = ((every - 1) * steps["galore"] + steps["galore, with a refresh"]) / every
    print(f"galore, refresh every {every} steps: {amortised / adam:.3f} of Adam", flush=True)
    refreshes = refresh_times(arguments.size, arguments.refresh_rank, 3)
    ratio = refreshes["svd"] / refreshes["randomized_svd"]
    shown = ", ".join(f"{name} {value:.2f} s" for name, value in refreshes.items())
    print(f"refresh of {arguments.size}^2, r={arguments.refresh_rank}: {shown}: {ratio:.1f}x")


if __name__ == "__main__":
    main()
