"""Time of the sparse product over the dense one, M = 1, on this machine's CPU or GPU.

    python benchmarks/sparse_products.py

First compares the implementation that this platform takes with float64. Then each round runs
every product once, on alternating copies of the weight that together exceed the caches. Two ratios
(below 1 is faster): of wall time, the median of the ratios within a round; and of busy time, the
best round counts (noise only adds). Busy are the processor seconds of the process, which other
programs on the machine disturb less, or what the profiler saw a GPU do: its wall time of one small
product is that of a launch. Writes sparse_products.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels import native
from pallas_kernels.device_time import busy_seconds, copies_beyond_cache
from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.self_check import SPARSE_CHECKS
from pallas_kernels.sparse_matmul import (
    KERNEL_LANES,
    BlockCodes,
    RowCodes,
    pack_rows,
    sparse_matmul,
)

DTYPES = ("float32", "float16", "bfloat16")
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)

Product = tuple[Callable, list, str]  # of a weight, copies of the weight, name of its base


def dense_products(rng: Any, x: jax.Array, thresholds: dict, n: int) -> dict[str, Product]:
    """Dense weights: the plain product, and the sparse one at every sparsity."""
    products: dict[str, Product] = {}
    for dtype in DTYPES:
        copies = [jnp.asarray(rng.standard_normal((x.shape[1], n), np.float32), dtype)] * 2
        copies[1] = copies[0][::-1] + 0  # another buffer
        rows = x.astype(dtype)
        dense = jax.jit(jnp.matmul)
        products[dtype] = (lambda w, rows=rows, f=dense: f(rows, w), copies, dtype)
        for s, t in thresholds.items():
            gated = jax.jit(sparse_matmul)
            call = lambda w, rows=rows, t=t, f=gated: f(rows, w, t)  # noqa: E731
            products[f"{dtype} at {s:.0%}"] = (call, copies, dtype)
    return products


def scales_and_table(rng: Any, k: int, n: int, bits: int, group: int) -> tuple:
    """Random scales and a random table."""
    lut = jnp.asarray(rng.standard_normal((1, 2**bits, 1)), jnp.float32)
    return jnp.asarray(0.5 + rng.random((-(-k // group), n)), jnp.bfloat16), lut


def row_codes(rng: Any, k: int, n: int, bits: int, group: int) -> RowCodes:
    """A random weight in the layout whose rows a GPU or TPU skips."""
    codes = rng.integers(0, 2**bits, (k, n)).astype(np.uint8)
    scales, lut = scales_and_table(rng, k, n, bits, group)
    words = pack_rows(jnp.asarray(codes), bits, KERNEL_LANES.get(jax.default_backend()))
    return RowCodes(words, scales, lut, None, group)


def packed_products(
    rng: Any, x: jax.Array, thresholds: dict, n: int, bits: int, group: int
) -> dict[str, Product]:
    """Codes of some bits: ``lut_matmul``, and the sparse product of the layout for this machine."""
    k = x.shape[1]
    scales, lut = scales_and_table(rng, k, n, bits, group)
    shape = packed_shape((k, n), bits)
    on_cpu = jax.default_backend() == "cpu"
    count = 3 if on_cpu else copies_beyond_cache(k * n * bits // 8)
    words = [jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(count)]
    blocks = [BlockCodes(w, scales, lut, None, k, group) for w in words]
    base = f"{bits}-bit"

    @jax.jit
    def alone(weight):
        return lut_matmul(x, weight.words, weight.scales, weight.lut, k=k, group_size=group)

    products: dict[str, Product] = {base: (alone, blocks, base)}
    gated = jax.jit(sparse_matmul)
    needed = count if not on_cpu else 2 * (bits == 4)
    rows = [row_codes(rng, k, n, bits, group) for _ in range(needed)]
    for s, t in thresholds.items():
        copies = blocks if on_cpu else rows
        products[f"{base} at {s:.0%}"] = (lambda w, t=t: gated(x, w, t), copies, base)
    if on_cpu and bits == 4:
        call = lambda w, t=thresholds[0.5]: gated(x, w, t)  # noqa: E731
        products[f"{base} packed by rows, xla, at 50%"] = (call, rows, base)
    return products


def check() -> dict[str, float | str]:
    """Relative errors of the implementation for this platform; raises where one is wrong."""
    outcomes = {str(check): check.run(None) for check in SPARSE_CHECKS}
    for name, outcome in outcomes.items():
        if outcome.status != "ok":
            raise SystemExit(f"{name}: {outcome.result}")
    return {name: outcome.result for name, outcome in outcomes.items()}


def seconds(call: Callable, copies: list, turn: int) -> tuple[float, float]:
    """Wall and busy seconds of a product with the copy whose turn it is."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(call(copies[turn % len(copies)]))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # All copies, one after the other: the cache has none of them when it is read again.
    busy = busy_seconds(lambda: [call(copy) for copy in copies], runs=1)
    return wall, cpu if busy is None else busy / len(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparsity")
    args = parser.parse_args()
    k, n = args.shape
    rng = np.random.default_rng(0)
    errors = check()
    x = jnp.asarray(rng.standard_normal((1, k)), jnp.float32)
    thresholds = {s: jnp.float32(np.quantile(np.abs(x), s)) for s in SPARSITIES}
    products = dense_products(rng, x, thresholds, n)
    if jax.default_backend() != "cpu":
        x = x.astype(jnp.bfloat16)  # as accelerators decode
    for bits in args.bits:
        products |= packed_products(rng, x, thresholds, n, bits, args.group_size)

    for call, copies, _ in tqdm(products.values(), desc="compiling"):
        for copy in copies:
            jax.block_until_ready(call(copy))
    times: dict[str, list] = {name: [] for name in products}
    for i in tqdm(range(args.rounds), desc="timing"):
        for name, (call, copies, _) in products.items():
            times[name].append(seconds(call, copies, i))

    results = {}
    for name, (_, _, base) in products.items():
        own, others = np.array(times[name]), np.array(times[base])
        results[name] = {
            "over": base,
            "wall_ratio": float(np.median(own[:, 0] / others[:, 0])),
            "busy_ratio": float(own[:, 1].min() / others[:, 1].min()),
            "wall_milliseconds": 1e3 * float(np.median(own[:, 0])),
            "busy_milliseconds": 1e3 * float(own[:, 1].min()),
        }
    machine = {
        "shape": [k, n],
        "group_size": args.group_size,
        "jax": jax.__version__,
        "instruction_set": native.instruction_sets()[0]
        if jax.default_backend() == "cpu" and native.library_path()
        else None,
        "device": jax.devices()[0].device_kind,
        "errors": errors,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": args.rounds,
    }
    table = [
        f"Sparse products, M = 1, {k} x {n}, groups of {args.group_size}, {machine['device']}, "
        f"{os.cpu_count()} cores, load {machine['load_average']:.1f}, "
        f"{machine['instruction_set']}; ratios to the product without sparsity.",
        "",
        "| product | over | busy time | wall | ms (busy) |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {r['over']} | {r['busy_ratio']:.2f} | {r['wall_ratio']:.2f} "
            f"| {r['busy_milliseconds']:.3f} |"
            for name, r in results.items()
        ),
    ]
    print("\n".join(table))
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**machine, "products": results}, indent=1)
    (args.out / "sparse_products.json").write_text(text + "\n")
    (args.out / "sparse_products.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
