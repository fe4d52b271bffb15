"""CPU products with a packed weight against the dense float32 product of JAX, in one run.

    python benchmarks/cpu_matmul.py [--k 4096 --n 4096 --group-size 128] [--rounds 15]

Variants take turns. Weights rotate through more memory than the last-level cache. Two ratios to
the dense product (below 1 is faster): of wall time, and of the CPU seconds that the process used,
which other programs on the machine disturb less. The best round counts for CPU time (noise only
adds), the median of the ratios within a round for wall time.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.codebooks import symmetric_int
from lutjax.io.blocks import float8_values
from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import lut_matmul

ROTATED_BYTES = 96 << 20
"""Of weights, dense or packed, that one program multiplies by."""

VARIANTS = [
    *((m, 4, "any", "cpu_native") for m in (1, 2, 4, 8, 32, 128, 512)),
    *((1, bits, "any", "cpu_native") for bits in (2, 3, 8)),
    (1, 8, "int", "cpu_native"),
    (1, 8, "float8", "cpu_native"),
    *((m, 4, "any", "xla") for m in (1, 32, 512)),
]
"""Rows, bits, table and implementation. ``int`` is equally spaced, ``float8`` is E4M3."""


def chain(product: Callable) -> Callable:
    """Multiplies one ``x`` by every weight; a sum makes all of them needed."""

    @jax.jit
    def run(x, weights, *shared):
        return sum(product(x, weight, *shared) for weight in weights)

    return run


def dense_program(rng, m: int, k: int, n: int) -> tuple[Callable, int]:
    copies = max(1, ROTATED_BYTES // (4 * k * n))
    x = jnp.asarray(rng.standard_normal((m, k), np.float32))
    weights = [jnp.asarray(rng.standard_normal((k, n), np.float32)) for _ in range(copies)]
    return functools.partial(chain(jnp.matmul), x, weights), copies


def packed_program(
    rng, m: int, k: int, n: int, group: int, bits: int, table: str, implementation: str
) -> tuple[Callable, int]:
    shape = packed_shape((k, n), bits)
    copies = max(1, ROTATED_BYTES // int(np.prod(shape))) if m < 32 else 1
    x = jnp.asarray(rng.standard_normal((m, k), np.float32))
    scales = jnp.asarray(rng.random((-(-k // group), n), np.float32), jnp.bfloat16)
    if table == "int":
        values = symmetric_int(bits)
    else:
        values = float8_values() if table == "float8" else rng.standard_normal(2**bits, np.float32)
    lut = jnp.asarray(values).reshape(1, -1, 1)
    weights = [jnp.asarray(rng.integers(0, 256, shape, np.uint8)) for _ in range(copies)]

    def product(x, words, scales, lut):
        return lut_matmul(
            x, words, scales, lut, k=k, group_size=group, implementation=implementation
        )

    return functools.partial(chain(product), x, weights, scales, lut), copies


def seconds(program: Callable, copies: int) -> tuple[float, float]:
    """Wall and CPU seconds a product."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(program())
    return (time.perf_counter() - wall) / copies, (time.process_time() - cpu) / copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    k, n, group = arguments.k, arguments.n, arguments.group_size
    rng = np.random.default_rng(0)
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, [{k}, {n}]"
    )
    print(f"{'M':>4} {'bits':>4} {'table':7}{'implementation':16}", end="")
    print(f"{'wall':>7}{'CPU':>7}{'dense ms':>10}{'ms':>8}")
    for m in sorted({m for m, *_ in VARIANTS}):
        programs = {None: dense_program(rng, m, k, n)}
        for rows, *key in VARIANTS:
            if rows == m:
                programs[tuple(key)] = packed_program(rng, m, k, n, group, *key)
        for program in programs.values():
            seconds(*program)
        rounds = arguments.rounds if m < 128 else max(3, arguments.rounds // 3)
        times = [{key: seconds(*p) for key, p in programs.items()} for _ in range(rounds)]
        for key in list(programs)[1:]:
            wall = statistics.median(t[key][0] / t[None][0] for t in times)
            cpu = min(t[key][1] for t in times) / min(t[None][1] for t in times)
            dense_ms, ms = (1e3 * min(t[name][0] for t in times) for name in (None, key))
            bits, table, implementation = key
            print(f"{m:4} {bits:4} {table:7}{implementation:16}", end="")
            print(f"{wall:7.2f}{cpu:7.2f}{dense_ms:10.2f}{ms:8.2f}")


if __name__ == "__main__":
    main()
