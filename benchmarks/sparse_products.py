"""Time of the sparse product over the dense one, M = 1, on this machine's CPU.

    python benchmarks/sparse_products.py

Each repetition runs every product once, on alternating copies of the weight that together exceed
the caches; ratios are medians over repetitions, so a load that slows all of them cancels out.
Writes benchmarks/results/sparsity/sparse_products.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.sparse_matmul import RowCodes, pack_rows, sparse_matmul

SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparsity")
    args = parser.parse_args()
    (k, n), group = args.shape, 128
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, k)), jnp.float32)
    thresholds = {s: jnp.float32(np.quantile(np.abs(x), s)) for s in SPARSITIES}

    products: dict = {}  # name -> (function of a weight, copies of the weight, name of its base)
    for dtype in ("float32", "float16", "bfloat16"):
        copies = [jnp.asarray(rng.standard_normal((k, n)), dtype) for _ in range(2)]
        dense = jax.jit(lambda w, x: x.astype(w.dtype) @ w)
        gated = jax.jit(sparse_matmul)
        products[dtype] = (lambda w, f=dense: f(w, x), copies, dtype)
        for s, t in thresholds.items():
            call = lambda w, t=t, f=gated: f(x.astype(w.dtype), w, t)  # noqa: E731
            products[f"{dtype} at {s:.0%}"] = (call, copies, dtype)
    for bits in args.bits:
        codes = [rng.integers(0, 2**bits, (k, n)).astype(np.uint8) for _ in range(2)]
        lut = jnp.asarray(rng.standard_normal((1, 2**bits, 1)), jnp.float32)
        scales = jnp.asarray(0.5 + rng.random((-(-k // group), n)), jnp.bfloat16)
        words = [pack(jnp.asarray(c), bits) for c in codes]
        rows = [RowCodes(pack_rows(jnp.asarray(c), bits), scales, lut, None, group) for c in codes]
        for name in (None, "xla"):
            alone = jax.jit(
                lambda w, x, scales, lut, name=name: lut_matmul(
                    x, w, scales, lut, k=k, group_size=group, implementation=name
                )
            )
            label = f"{bits}-bit" + ("" if name is None else f" {name}")
            call = lambda w, f=alone, s=scales, t=lut: f(w, x, s, t)  # noqa: E731
            products[label] = (call, words, label)
        gated = jax.jit(sparse_matmul)
        for s, t in thresholds.items():
            call = lambda w, t=t, f=gated: f(x, w, t)  # noqa: E731
            products[f"{bits}-bit at {s:.0%}"] = (call, rows, f"{bits}-bit xla")
    for call, copies, _ in tqdm(products.values(), desc="compiling"):
        jax.block_until_ready(call(copies[0]))
    seconds = {name: [] for name in products}
    for i in tqdm(range(args.repetitions), desc="timing"):
        for name, (call, copies, _) in products.items():
            start = time.perf_counter()
            jax.block_until_ready(call(copies[i % 2]))
            seconds[name].append(time.perf_counter() - start)

    results = {}
    for name, (_, _, base) in products.items():
        own = np.array(seconds[name])
        ratios = {"over": base, "ratio": float(np.median(own / seconds[base]))}
        if "bit at" in name:
            ratios["over_default"] = float(np.median(own / seconds[base.removesuffix(" xla")]))
        results[name] = {"milliseconds": 1e3 * float(np.median(own)), **ratios}
        extra = f"  {ratios['over_default']:.2f} of default" if "over_default" in ratios else ""
        print(
            f"{name:<18} {results[name]['milliseconds']:7.1f} ms  "
            f"{ratios['ratio']:.2f} of {base}{extra}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    header = {"shape": [k, n], "group_size": group, "jax": jax.__version__}
    (args.out / "sparse_products.json").write_text(
        json.dumps({**header, "products": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
