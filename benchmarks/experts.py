"""Time and memory of a mixture of experts, dense and at 4 bits.

The block has the shape of Qwen3-30B-A3B's unless told otherwise, with random weights and tokens.
It runs as it is (JAX's `ragged_dot`), lifted, so that rows are put into tiles, and lifted with
compressed experts, in turn.

    python benchmarks/experts.py --output benchmarks/results/experts.json

One of gpt-oss-20b's, without its biases:

    python benchmarks/experts.py --experts 32 --taken 4 --hidden 2880 --width 2880 --rounds 3 \
      --output benchmarks/results/experts-gpt-oss.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import lutjax
from lutjax.models import DecoderConfig
from lutjax.models.mlp import MixtureOfExperts


def seconds(function, *args) -> float:
    """How long a call of a compiled function takes."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--taken", type=int, default=8, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768, help="of an expert")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file to write, too")
    arguments = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu"
    config = DecoderConfig(
        vocab_size=1,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.taken,
        dtype=jnp.bfloat16 if on_gpu else jnp.float32,
    )
    block = MixtureOfExperts(config)
    token = jnp.zeros((1, 1, arguments.hidden), config.dtype)
    params = jax.jit(block.init)(jax.random.key(0), token)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    compressed = lutjax.quantize(params, bits=arguments.bits)
    if on_gpu:
        compressed = lutjax.prepack(compressed)

    def apply(params, x):
        return block.apply({"params": params}, x)

    lifted = lutjax.lift(apply, strict=True)
    variants = {
        "dense, ragged_dot": (apply, params),
        "dense, lifted": (lifted, params),
        f"{arguments.bits} bits": (lifted, compressed),
    }
    megabytes = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(weights["experts"])) / 1e6
        for name, (_, weights) in variants.items()
    }
    milliseconds: dict[int, dict[str, float]] = {}
    for count in arguments.tokens:
        shape = (arguments.rounds + 1, 1, count, arguments.hidden)
        x = jax.random.normal(jax.random.key(1), shape, config.dtype)
        programs = {name: jax.jit(run) for name, (run, _) in variants.items()}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(arguments.rounds):
            for name, (_, weights) in variants.items():
                # Other tokens, so other experts; and no call pays for what the one before left.
                jax.block_until_ready(programs[name](weights, x[repeat + 1]))
                times[name].append(1e3 * seconds(programs[name], weights, x[repeat]))
        milliseconds[count] = {name: statistics.median(t) for name, t in times.items()}

    counts = [f"{n} token{'s' if n > 1 else ''}, ms" for n in arguments.tokens]
    print(f"| experts | MB | {' | '.join(counts)} |")
    print(f"|---|---|{'---|' * len(arguments.tokens)}")
    for name in variants:
        row = " | ".join(f"{milliseconds[count][name]:.1f}" for count in arguments.tokens)
        print(f"| {name} | {megabytes[name]:.0f} | {row} |")
    if arguments.output is not None:
        result = {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "experts": arguments.experts,
            "taken": arguments.taken,
            "hidden": arguments.hidden,
            "width": arguments.width,
            "rounds": arguments.rounds,
            "megabytes": megabytes,
            "milliseconds": milliseconds,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
