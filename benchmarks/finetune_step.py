"""Time and memory of a LoRA step on a low-rank plus quantised base, against a dense base.

Both bases are SmolLM2-135M-Instruct, in one process, step by step in turn, so that a busy machine
slows both alike. The factors are random: the time does not depend on their values. Processor time
is what counts where other programs share the machine.

    python benchmarks/finetune_step.py --output benchmarks/results/finetune_step.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lutjax
from lutjax.adapters import lora
from lutjax.io import demo_model_path
from lutjax.models import Decoder
from lutjax.models.stacking import stack_layers
from lutjax.paths import named_leaves
from train.lora_step import Batch, Trained, TrainState, make_step, next_token


def megabytes(tree) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


def matrices(tree) -> list:
    """The matrices of the blocks, dense or compressed: what LQ-LoRA compresses."""
    return [leaf for path, leaf in named_leaves(tree) if path.endswith("_proj/kernel")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="by default the demo model")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=None, help="only so many blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file to write, too")
    arguments = parser.parse_args()

    model, params, _ = lutjax.load(arguments.model or demo_model_path())
    config = model.config
    if arguments.layers is not None:
        config = dataclasses.replace(config, num_layers=arguments.layers)
        params["layers"] = {str(i): params["layers"][str(i)] for i in range(arguments.layers)}
    quantized = lutjax.quantize(params, bits=arguments.bits, group_size=arguments.group_size)
    # Stacked layers compile once instead of once for every block; the work is the same.
    model = Decoder(dataclasses.replace(config, scan_layers=True))
    bases = {"dense": stack_layers(params), "lq": stack_layers(quantized)}
    del params, quantized

    rng = np.random.default_rng(0)
    shape = (1, arguments.rows, arguments.length)
    tokens, targets = (
        jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32) for _ in range(2)
    )
    batch = Batch(tokens, jnp.ones(shape, jnp.int32), targets)
    optimizer = optax.adamw(1e-4)
    step = make_step(next_token(lutjax.lift(model.apply, strict=True)), optimizer)
    states, updates, temporary = {}, {}, {}
    for name, base in bases.items():
        key = jax.random.key(0)
        trained = Trained(lora.init(base, arguments.rank, key, targets=("*_proj/kernel",)))
        states[name] = TrainState(trained, optimizer.init(trained))
        updates[name] = step.update.lower(states[name], base, batch).compile()
        temporary[name] = updates[name].memory_analysis().temp_size_in_bytes / 1e6
    times: dict[str, list[float]] = {name: [] for name in bases}
    cpu: dict[str, list[float]] = {name: [] for name in bases}
    for repeat in range(arguments.repeats + 1):
        for name, base in bases.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            states[name], _ = jax.block_until_ready(updates[name](states[name], base, batch))
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - cpu_began)
    ratios, cpu_ratios = (
        statistics.median(a / b for a, b in zip(t["lq"], t["dense"], strict=True))
        for t in (times, cpu)
    )
    result = {
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "tokens": arguments.rows * arguments.length,
        "rank": arguments.rank,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "ratio": ratios,
        "ratio_of_fastest": min(times["lq"]) / min(times["dense"]),
        "cpu_seconds": {name: statistics.median(t) for name, t in cpu.items()},
        "cpu_ratio": cpu_ratios,
        "cpu_ratio_of_fastest": min(cpu["lq"]) / min(cpu["dense"]),
        "base_megabytes": {name: megabytes(base) for name, base in bases.items()},
        "matrix_megabytes": {name: megabytes(matrices(base)) for name, base in bases.items()},
        "temporary_megabytes": temporary,
        "trained_megabytes": megabytes(states["lq"].trained),
    }
    result["base_fraction"] = result["base_megabytes"]["lq"] / result["base_megabytes"]["dense"]
    result["matrix_fraction"] = (
        result["matrix_megabytes"]["lq"] / result["matrix_megabytes"]["dense"]
    )
    result["rounds"] = {"seconds": times, "cpu_seconds": cpu}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
