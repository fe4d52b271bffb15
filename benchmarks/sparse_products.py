"""Time of the sparse product over the dense one, M = 1, on this machine's CPU.

    python benchmarks/sparse_products.py

Each round runs every product once, on alternating copies of the weight that together exceed the
caches. Two ratios (below 1 is faster): of wall time, the median of the ratios within a round; and
of the processor seconds that the process used, which other programs on the machine disturb less,
the best round counts (noise only adds). Writes sparse_products.json and .md.
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
from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.sparse_matmul import BlockCodes, RowCodes, pack_rows, sparse_matmul

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)

Product = tuple[Callable, list, str]  # of a weight, copies of the weight, name of its base


def dense_products(rng: Any, x: jax.Array, thresholds: dict, n: int) -> dict[str, Product]:
    """Dense weights: the plain product, and the sparse one at every sparsity."""
    products: dict[str, Product] = {}
    for dtype in ("float32", "float16", "bfloat16"):
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


def packed_products(
    rng: Any, x: jax.Array, thresholds: dict, n: int, bits: int, group: int, rows: bool
) -> dict[str, Product]:
    """Codes of some bits: ``lut_matmul``, and the sparse product of the same words or of rows."""
    k = x.shape[1]
    lut = jnp.asarray(rng.standard_normal((1, 2**bits, 1)), jnp.float32)
    scales = jnp.asarray(0.5 + rng.random((-(-k // group), n)), jnp.bfloat16)
    shape = packed_shape((k, n), bits)
    words = [jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(3)]
    blocks = [BlockCodes(w, scales, lut, None, k, group) for w in words]
    base = f"{bits}-bit"

    @jax.jit
    def alone(weight):
        return lut_matmul(x, weight.words, weight.scales, weight.lut, k=k, group_size=group)

    products: dict[str, Product] = {base: (alone, blocks, base)}
    gated = jax.jit(sparse_matmul)
    for s, t in thresholds.items():
        products[f"{base} at {s:.0%}"] = (lambda w, t=t: gated(x, w, t), blocks, base)
    if rows:
        codes = [rng.integers(0, 2**bits, (k, n)).astype(np.uint8) for _ in range(2)]
        packed = [
            RowCodes(pack_rows(jnp.asarray(c), bits), scales, lut, None, group) for c in codes
        ]
        call = lambda w, t=thresholds[0.5]: gated(x, w, t)  # noqa: E731
        products[f"{base} packed by rows, xla, at 50%"] = (call, packed, base)
    return products


def seconds(call: Callable, weight: Any) -> tuple[float, float]:
    """Wall and processor seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(call(weight))
    return time.perf_counter() - wall, time.process_time() - cpu


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
    x = jnp.asarray(rng.standard_normal((1, k)), jnp.float32)
    thresholds = {s: jnp.float32(np.quantile(np.abs(x), s)) for s in SPARSITIES}
    products = dense_products(rng, x, thresholds, n)
    for bits in args.bits:
        products |= packed_products(rng, x, thresholds, n, bits, args.group_size, bits == 4)

    for call, copies, _ in tqdm(products.values(), desc="compiling"):
        for copy in copies:
            seconds(call, copy)
    times: dict[str, list] = {name: [] for name in products}
    for i in tqdm(range(args.rounds), desc="timing"):
        for name, (call, copies, _) in products.items():
            times[name].append(seconds(call, copies[i % len(copies)]))

    results = {}
    for name, (_, _, base) in products.items():
        own, others = np.array(times[name]), np.array(times[base])
        results[name] = {
            "over": base,
            "wall_ratio": float(np.median(own[:, 0] / others[:, 0])),
            "processor_ratio": float(own[:, 1].min() / others[:, 1].min()),
            "wall_milliseconds": 1e3 * float(np.median(own[:, 0])),
            "processor_milliseconds": 1e3 * float(own[:, 1].min()),
        }
    machine = {
        "shape": [k, n],
        "group_size": args.group_size,
        "jax": jax.__version__,
        "instruction_set": native.instruction_sets()[0]
        if jax.default_backend() == "cpu" and native.library_path()
        else None,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": args.rounds,
    }
    table = [
        f"Sparse products, M = 1, {k} x {n}, groups of {args.group_size}, {os.cpu_count()} cores, "
        f"load {machine['load_average']:.1f}, {machine['instruction_set']}; ratios to the product "
        "without sparsity.",
        "",
        "| product | over | processor time | wall | ms (processor) |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {r['over']} | {r['processor_ratio']:.2f} | {r['wall_ratio']:.2f} "
            f"| {r['processor_milliseconds']:.2f} |"
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
