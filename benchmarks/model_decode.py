"""Tokens a second of a decoder of Llama-3-8B's shape with random weights: bfloat16 and packed.

    python benchmarks/model_decode.py [--rows 1 16] [--bits 4] [--smoke] [--output FOLDER]

A model is its matrices (q, k, v in one product, gate and up in another), norms, attention over a
cache of keys and values, and greedy tokens, in one program for all tokens; there are no rotary
positions. Embedding and head are bfloat16 in every variant. Packed weights are prepacked for the
platform's own kernel. The variants take turns; the median of rounds counts. ``--smoke`` shows on
any machine that the program works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from kernels import best_implementation

from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import IMPLEMENTATIONS, PackedWeight, packed_matmul, prepack

GROUP = 128
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a decoder."""

    layers: int = 32
    width: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    slots: int = 256

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of a layer."""
        return {
            "qkv": (self.width, (self.heads + 2 * self.kv_heads) * self.head),
            "out": (self.width, self.width),
            "gate_up": (self.width, 2 * self.inner),
            "down": (self.inner, self.width),
        }


SMOKE = Shape(layers=2, width=128, inner=256, heads=4, kv_heads=2, vocabulary=64, slots=16)


def random_matrix(key: jax.Array, k: int, n: int, bits: int | None, name: str) -> Any:
    """A matrix that keeps the variance of what it multiplies: dense (``bits`` None) or packed."""
    if bits is None:
        return jax.random.normal(key, (k, n), DTYPE) * jnp.asarray(k**-0.5, DTYPE)
    words = jax.random.bits(key, packed_shape((k, n), bits), jnp.uint8)
    lut = jnp.linspace(-1.7, 1.7, 2**bits, dtype=jnp.float32).reshape(1, -1, 1)
    scales = jnp.full((-(-k // GROUP), n), k**-0.5, DTYPE)
    return prepack(words, scales, lut, k=k, group_size=GROUP, implementation=name)


def random_model(shape: Shape, bits: int | None, name: str) -> dict:
    """Random weights; every matrix is made on the device, one after the other."""
    make = jax.jit(random_matrix, static_argnums=(1, 2, 3, 4))
    keys = iter(jax.random.split(jax.random.key(0), shape.layers * 4 + 2))
    layers = [
        {part: make(next(keys), *size, bits, name) for part, size in shape.matrices.items()}
        for _ in range(shape.layers)
    ]
    table = (shape.width, shape.vocabulary)
    head, embedding = (make(next(keys), *table, None, name) for _ in range(2))
    return {"layers": layers, "head": head, "embedding": embedding.T}


def dot(x: jax.Array, weight: Any) -> jax.Array:
    """``x @ W`` for either kind of weight."""
    return packed_matmul(x, weight) if isinstance(weight, PackedWeight) else x @ weight


def norm(x: jax.Array) -> jax.Array:
    """RMS normalisation without a scale."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype)


def attend(shape: Shape, q: jax.Array, keys: jax.Array, values: jax.Array, slot: Any) -> jax.Array:
    """One query a sequence, ``[B, heads · head]``, against the slots up to ``slot``."""
    batch = q.shape[0]
    q = q.reshape(batch, shape.kv_heads, -1, shape.head)
    scores = jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)
    seen = (jnp.arange(shape.slots) <= slot)[None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * shape.head**-0.5, -1e30), axis=-1)
    return jnp.einsum("bkgs,bskh->bkgh", weights.astype(values.dtype), values).reshape(batch, -1)


def step(shape: Shape, model: dict, tokens: jax.Array, caches: list, slot: Any) -> tuple:
    """The next tokens ``[B]`` and the caches."""
    x = model["embedding"][tokens]
    new = []
    kv = shape.kv_heads * shape.head
    for layer, (keys, values) in zip(model["layers"], caches, strict=True):
        q, k, v = jnp.split(dot(norm(x), layer["qkv"]), (shape.width, shape.width + kv), axis=1)
        one = (x.shape[0], 1, shape.kv_heads, shape.head)
        keys = jax.lax.dynamic_update_slice(keys, k.reshape(one), (0, slot, 0, 0))
        values = jax.lax.dynamic_update_slice(values, v.reshape(one), (0, slot, 0, 0))
        new.append((keys, values))
        x = x + dot(attend(shape, q, keys, values, slot), layer["out"])
        gate, up = jnp.split(dot(norm(x), layer["gate_up"]), 2, axis=1)
        x = x + dot(jax.nn.silu(gate) * up, layer["down"])
    return jnp.argmax(norm(x) @ model["head"], axis=-1).astype(jnp.int32), new


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate(shape: Shape, model: dict, tokens: jax.Array, count: int) -> jax.Array:
    """``count`` greedy tokens after ``tokens``, ``int32[count, B]``."""
    size = (tokens.shape[0], shape.slots, shape.kv_heads, shape.head)
    caches = [(jnp.zeros(size, DTYPE), jnp.zeros(size, DTYPE)) for _ in range(shape.layers)]

    def one(state: tuple, slot: Any) -> tuple:
        tokens, caches = step(shape, model, state[0], state[1], slot)
        return (tokens, caches), tokens

    return jax.lax.scan(one, (tokens, caches), jnp.arange(count))[1]


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
    shape = SMOKE if args.smoke else Shape()
    tokens, rounds = (2, 1) if args.smoke else (args.tokens, args.rounds)
    args.output.mkdir(parents=True, exist_ok=True)
    name = best_implementation(args.implementations)
    models = {"bf16": random_model(shape, None, name)}
    models |= {f"{bits}-bit": random_model(shape, bits, name) for bits in args.bits}
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "smoke": args.smoke,
        "implementation": name,
        "shape": dataclasses.asdict(shape),
        "gigabytes": {
            kind: sum(a.nbytes for a in jax.tree.leaves(model)) / 1e9
            for kind, model in models.items()
        },
        "tokens_per_second": {},
        "over_bf16": {},
    }
    for rows in args.rows:
        start = jnp.arange(rows, dtype=jnp.int32) % shape.vocabulary
        times: dict[str, list[float]] = {kind: [] for kind in models}
        for model in models.values():
            jax.block_until_ready(generate(shape, model, start, tokens))
        for _ in range(rounds):
            for kind, model in models.items():
                begin = time.perf_counter()
                jax.block_until_ready(generate(shape, model, start, tokens))
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
