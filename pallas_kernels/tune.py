"""Times the candidate configurations of the Hopper kernel on this GPU and keeps the best.

python -m pallas_kernels.tune --shapes 4096x4096 4096x28672 --bits 4 3 2 --rows 1 16 64
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platforms
from pallas_kernels.device_time import busy_seconds, copies_beyond_cache
from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import mosaic_gpu, reference, tuning

GROUP = 128
MOST = 24
"""Candidates that are timed, the best estimates first."""
LIMIT = 1.1e-2
"""Relative error of a product in bfloat16."""


def seconds(config: Any, m: int, k: int, n: int, bits: int) -> float:
    """Time of one product, over copies of the weight that exceed the cache.

    What the GPU was busy for, or the median wall time where no profiler sees it.

    Raises:
      ArithmeticError: If the product is wrong.
    """
    copies = copies_beyond_cache(k * n * bits // 8)
    keys = jax.random.split(jax.random.key(0), copies)
    words = [jax.random.bits(key, packed_shape((k, n), bits), jnp.uint8) for key in keys]
    scales = jnp.ones((k // GROUP, n), jnp.bfloat16)
    lut = jax.random.normal(jax.random.key(1), (1, 2**bits, 1))
    x = jax.random.normal(jax.random.key(2), (m, k), jnp.bfloat16)
    problem = mosaic_gpu.make_problem(m, words[0], k=k, group_size=GROUP, config=config)
    pack = jax.jit(lambda w: mosaic_gpu.prepack(w, scales, lut, problem, x.dtype))
    packed = [pack(w) for w in words]
    # lowered once
    one = jax.jit(lambda x, p: mosaic_gpu.apply(x, p, problem, out_dtype=x.dtype))
    run = jax.jit(lambda x, packed: [one(x, p) for p in packed])
    error = relative_error(run(x, packed)[0], x, words[0], scales, lut)
    if not error <= LIMIT:
        raise ArithmeticError(f"relative error {error}")
    busy = busy_seconds(run, x, packed)
    if busy is not None:
        return busy / copies
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready([run(x, packed) for _ in range(5)])
        times.append((time.perf_counter() - start) / 5 / copies)
    return statistics.median(times)


def relative_error(y: jax.Array, x: jax.Array, *weight: jax.Array) -> float:
    """Frobenius norm of the difference to the reference over that of the reference."""
    expected = reference.lut_matmul(x.astype(jnp.float32), *weight, k=x.shape[1], group_size=GROUP)
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    return float(error)


def tune(m: int, k: int, n: int, bits: int) -> dict:
    """The entry of the fastest configuration that compiles and is right."""
    best: tuple[float, Any] | None = None
    for config in mosaic_gpu.candidates(m, bits, k=k, n=n, group_size=GROUP)[:MOST]:
        try:
            took = seconds(config, m, k, n, bits)
        except Exception as error:
            print(f"  {config}: {type(error).__name__} {str(error)[:100]}")
            continue
        print(f"  {config}: {took * 1e6:.1f} us", flush=True)
        if best is None or took < best[0]:
            best = took, config
    if best is None:
        raise RuntimeError(f"no configuration runs for M={m}, K={k}, N={n}, {bits} bits")
    entry = {"bits": bits, "m": m, "k": k, "n": n, "config": dataclasses.asdict(best[1])}
    return {**entry, "microseconds": round(best[0] * 1e6, 2)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x28672"], metavar="KxN")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 512])
    args = parser.parse_args()
    kind = platforms.device_kind("cuda")
    if kind is None:
        print(f"the tuner needs an NVIDIA GPU; the default backend is {jax.default_backend()!r}")
        return 2
    for shape in args.shapes:
        k, n = (int(size) for size in shape.split("x"))
        for bits in args.bits:
            for m in args.rows:
                print(f"K={k} N={n} M={m} {bits} bits")
                print(tuning.save("mosaic_gpu", kind, [tune(m, k, n, bits)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
