"""Checks and times ``lut_matmul`` on the accelerator that is there.

    python benchmarks/kernels.py [--quick] [--output benchmarks/results]

Writes ``kernels-<device>.json`` and ``.md``: errors of every implementation against float64, then
times with the ceilings of the same run (a device copy and a large bf16 product). Weights are
random and rotate through more memory than the last-level cache; a time is the median of many
replays of one program that multiplies by all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import IMPLEMENTATIONS, lut_matmul, packed_matmul, prepack
from pallas_kernels.lut_matmul.reference import dequantize

LLAMA_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LLAMA_70B = ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)
GROUP = 128
CACHE_BYTES = 128 << 20
"""Weights rotate through at least this much memory, twice the L2 of an H200."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One line of the table."""

    k: int
    n: int
    m: int
    bits: int
    implementation: str
    microseconds: float
    copy_fraction: float
    speedup: float


def median_seconds(function: Any, *args: Any, budget: float = 0.3) -> float:
    """Median time of a compiled function, warmed up; many calls are in flight at once."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = max(time.perf_counter() - start, 1e-6)
    calls = max(1, min(20, int(0.02 / once)))
    times = []
    for _ in range(max(3, min(30, int(budget / (once * calls))))):
        start = time.perf_counter()
        out = [function(*args) for _ in range(calls)]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy."""
    size = (1 << 30) if jax.default_backend() != "cpu" else (1 << 26)
    data = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    return 2 * size / median_seconds(jax.jit(lambda a: a ^ np.uint32(1)), data)


def product_flops() -> float:
    """Operations a second of a large bf16 product."""
    n = 8192 if jax.default_backend() != "cpu" else 1024
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    return 2 * n**3 / median_seconds(jax.jit(jnp.matmul), a, a)


def random_weight(key: jax.Array, k: int, n: int, bits: int) -> tuple:
    """Random words, scales and a table."""
    words_key, scale_key, table_key = jax.random.split(key, 3)
    words = jax.random.bits(words_key, packed_shape((k, n), bits), jnp.uint8)
    scales = jax.random.uniform(scale_key, (-(-k // GROUP), n), jnp.float32, 0.5, 1.5)
    lut = jax.random.normal(table_key, (1, 2**bits, 1)).astype(jnp.bfloat16).astype(jnp.float32)
    return words, scales.astype(jnp.bfloat16), lut


def check(implementation: str, bits: int, m: int, dtype: Any, transpose: bool) -> float | str:
    """Relative Frobenius error on one small product, or why it cannot run."""
    k, n = 576, 320
    words, scales, lut = random_weight(jax.random.key(bits), k, n, bits)
    x = jax.random.normal(jax.random.key(m), (m, n if transpose else k), jnp.float32).astype(dtype)
    try:
        y = lut_matmul(
            x,
            words,
            scales,
            lut,
            k=k,
            group_size=GROUP,
            transpose=transpose,
            implementation=implementation,
        )
        again = lut_matmul(
            x,
            words,
            scales,
            lut,
            k=k,
            group_size=GROUP,
            transpose=transpose,
            implementation=implementation,
        )
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"
    if not np.array_equal(np.asarray(y), np.asarray(again)):
        return "FAILED two runs differ"
    weight = np.asarray(dequantize(words, scales, lut, k=k, group_size=GROUP), np.float64)
    expected = np.asarray(x, np.float64) @ (weight.T if transpose else weight)
    error_norm = np.linalg.norm(np.asarray(y, np.float64) - expected)
    return float(error_norm / np.linalg.norm(expected))


def check_all() -> list[dict]:
    """Every implementation over a few shapes; prints what fails."""
    limits = {jnp.bfloat16: 1.1e-2, jnp.float16: 2e-3, jnp.float32: 1e-5}
    rows = []
    for name in IMPLEMENTATIONS:
        for bits, m, dtype, transpose in (
            (2, 1, jnp.bfloat16, False),
            (3, 16, jnp.bfloat16, False),
            (4, 5, jnp.float16, False),
            (8, 130, jnp.bfloat16, False),
            (4, 3, jnp.float32, False),
            (4, 16, jnp.bfloat16, True),
        ):
            result = check(name, bits, m, dtype, transpose)
            passed = isinstance(result, float) and result <= limits[dtype]
            refused = isinstance(result, str) and not result.startswith("FAILED")
            status = "ok" if passed else "refused" if refused else "FAILED"
            rows.append(
                {
                    "implementation": name,
                    "bits": bits,
                    "m": m,
                    "dtype": jnp.dtype(dtype).name,
                    "transpose": transpose,
                    "status": status,
                    "result": result,
                }
            )
            print(
                f"check {name:14s} b{bits} m{m} {rows[-1]['dtype']} {status} {result}", flush=True
            )
    return rows


def best_implementation() -> str:
    """The first kernel for this platform that takes a plain 4-bit product."""
    kernels = {"gpu": ("mosaic_gpu", "pallas_triton"), "tpu": ("mosaic_tpu",)}
    for name in kernels.get(jax.default_backend(), ()):
        if isinstance(check(name, 4, 16, jnp.bfloat16, False), float):
            return name
    return "xla"


def time_shape(k: int, n: int, ms: tuple[int, ...], bits: tuple[int, ...], copy: float) -> list:
    """Dense and compressed products of one weight shape."""
    name = best_implementation()
    keys = jax.random.split(jax.random.key(0), 64)
    dense_copies = max(1, -(-CACHE_BYTES // (2 * k * n)))
    dense = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys[:dense_copies]]
    product = jax.jit(lambda x, weights: [x @ w for w in weights])
    rows = []
    dense_time = {}
    for m in ms:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        seconds = median_seconds(product, x, dense) / dense_copies
        dense_time[m] = seconds
        moved = 2 * (k * n + m * k + m * n)
        rows.append(Timing(k, n, m, 16, "dense bf16", seconds * 1e6, moved / seconds / copy, 1.0))
    del dense
    for b in bits:
        size = k * n * b // 8
        copies = min(32, max(1, -(-CACHE_BYTES // size)))
        pack_one = jax.jit(functools.partial(prepack, k=k, group_size=GROUP, implementation=name))
        weights = [pack_one(*random_weight(key, k, n, b)) for key in keys[:copies]]
        stored = size + 2 * (k // GROUP) * n
        run = jax.jit(lambda x, weights: [packed_matmul(x, w) for w in weights])
        for m in ms:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            try:
                seconds = median_seconds(run, x, weights) / copies
            except Exception as error:
                print(f"{k}x{n} m{m} b{b} FAILED {type(error).__name__}: {str(error)[:300]}")
                continue
            moved = stored + 2 * m * (k + n)
            timing = Timing(
                k, n, m, b, name, seconds * 1e6, moved / seconds / copy, dense_time[m] / seconds
            )
            rows.append(timing)
            print(timing, flush=True)
        del weights
    return rows


def markdown(report: dict) -> str:
    """The report as tables."""
    lines = [
        f"# lut_matmul on {report['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        f"Ceilings of this run: copy {report['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + "
        f"written), bf16 product {report['product_flops'] / 1e12:.0f} TFLOP/s.",
        "",
        "| K | N | M | bits | implementation | us | fraction of copy | over bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in report["timings"]:
        lines.append(
            f"| {t['k']} | {t['n']} | {t['m']} | {t['bits']} | {t['implementation']} | "
            f"{t['microseconds']:.1f} | {t['copy_fraction']:.2f} | {t['speedup']:.2f} |"
        )
    lines += ["", "| implementation | bits | M | dtype | transposed | status | error or reason |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for c in report["checks"]:
        result = c["result"] if isinstance(c["result"], str) else f"{c['result']:.1e}"
        lines.append(
            f"| {c['implementation']} | {c['bits']} | {c['m']} | {c['dtype']} | {c['transpose']} | "
            f"{c['status']} | {result} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, four M: a few minutes")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "checks": check_all(),
        "copy_bytes_per_second": copy_bandwidth(),
        "product_flops": product_flops(),
        "timings": [],
    }
    on_cpu = jax.default_backend() == "cpu"
    shapes = ((512, 1024),) if on_cpu else LLAMA_8B + LLAMA_70B
    ms: tuple[int, ...] = (1, 16) if on_cpu else ROWS
    if args.quick and not on_cpu:
        shapes, ms = ((4096, 4096), (4096, 28672)), (1, 16, 64, 512)
    if not args.checks_only:
        for k, n in shapes:
            timings = time_shape(k, n, ms, (4, 3, 2), report["copy_bytes_per_second"])
            report["timings"] += [dataclasses.asdict(t) for t in timings]
    args.output.mkdir(parents=True, exist_ok=True)
    name = "kernels-" + device.device_kind.lower().replace(" ", "-")
    (args.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / f"{name}.md").write_text(markdown(report))
    print(markdown(report))
    return int(any(c["status"] == "FAILED" for c in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
