"""Tokens a second of a decoder of Llama-3-8B's shape with random weights: bfloat16 and packed.

    python benchmarks/model_decode.py [--rows 1 16] [--bits 4] [--smoke] [--output FOLDER]

The model is the library's own, with its projections joined (`lutjax.fuse_projections`) in every
variant, and a cache of keys and values; greedy tokens, in one program for all of them. Embedding
and head are bfloat16 in every variant. Packed weights are prepacked for the platform's own kernel.
The variants take turns; the median of rounds counts. ``--smoke`` shows on any machine that the
program works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from kernels import best_implementation

import lutjax
from lutjax.models import MODELS, Decoder, DecoderConfig, init_cache
from pallas_kernels.lut_matmul import IMPLEMENTATIONS

GROUP = 128
SLOTS = 256
LLAMA_3_8B = dataclasses.replace(MODELS["llama-3-8b"], dtype=jnp.bfloat16)
SMOKE = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)


def random_params(config: DecoderConfig, bits: int | None, implementation: str) -> dict:
    """Random weights, dense or packed; every block is made on the device, one after the other."""
    one = Decoder(dataclasses.replace(config, num_layers=1))

    def parts(key: jax.Array) -> dict:
        params = one.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda a: a.astype(config.dtype), lutjax.fuse_projections(params))

    @jax.jit
    def block(key: jax.Array) -> dict:
        params = parts(key)["layers"]["0"]
        return params if bits is None else lutjax.quantize(params, bits=bits, group_size=GROUP)

    @jax.jit
    def rest(key: jax.Array) -> dict:
        params = parts(key)
        return {name: part for name, part in params.items() if name != "layers"}

    last, *keys = jax.random.split(jax.random.key(0), config.num_layers + 1)
    layers = {}
    for i, key in enumerate(keys):
        layers[str(i)] = block(key)
        if bits is not None:
            layers[str(i)] = lutjax.prepack(layers[str(i)], implementation=implementation)
    return {**rest(last), "layers": layers}


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def generate(
    apply: Callable, config: DecoderConfig, params: dict, tokens: jax.Array, count: int
) -> jax.Array:
    """``count`` greedy tokens after ``tokens``, ``int32[count, B]``."""

    def one(state: tuple, _: None) -> tuple:
        tokens, cache = state
        logits, cache = apply({"params": params}, tokens[:, None], cache=cache)
        tokens = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return (tokens, cache), tokens

    cache = init_cache(config, tokens.shape[0], SLOTS, config.dtype)
    return jax.lax.scan(one, (tokens, cache), length=count)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="sequences at a time")
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two tokens, one round")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    config = SMOKE if args.smoke else LLAMA_3_8B
    tokens, rounds = (2, 1) if args.smoke else (args.tokens, args.rounds)
    args.output.mkdir(parents=True, exist_ok=True)
    name = best_implementation(args.implementations)
    models = {"bf16": random_params(config, None, name)}
    models |= {f"{bits}-bit": random_params(config, bits, name) for bits in args.bits}
    dense, lifted = Decoder(config).apply, lutjax.lift(Decoder(config).apply, strict=True)
    runs = {
        kind: functools.partial(generate, dense if kind == "bf16" else lifted, config, params)
        for kind, params in models.items()
    }
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "smoke": args.smoke,
        "implementation": name,
        "shape": {
            name: size for name, size in dataclasses.asdict(config).items() if type(size) is int
        },
        "gigabytes": {
            kind: sum(a.nbytes for a in jax.tree.leaves(model)) / 1e9
            for kind, model in models.items()
        },
        "tokens_per_second": {},
        "over_bf16": {},
    }
    for rows in args.rows:
        start = jnp.arange(rows, dtype=jnp.int32) % config.vocab_size
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for run in runs.values():
            jax.block_until_ready(run(start, tokens))
        for _ in range(rounds):
            for kind, run in runs.items():
                begin = time.perf_counter()
                jax.block_until_ready(run(start, tokens))
                times[kind].append(time.perf_counter() - begin)
        result["tokens_per_second"][rows] = {
            kind: rows * tokens / statistics.median(taken) for kind, taken in times.items()
        }
        result["over_bf16"][rows] = {
            kind: statistics.median(a / b for a, b in zip(times["bf16"], taken, strict=True))
            for kind, taken in times.items()
        }
        path = args.output / f"model_decode-{result['device'].lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
