"""Checks and times ``lut_matmul`` on the accelerator that is there.

    python benchmarks/kernels.py [--quick] [--shapes KxN ...] [--output benchmarks/results]

Writes ``kernels-<device>.json`` and ``.md``, after every line: errors of every implementation
against float64, then times with the ceilings of the same run (a device copy and a large bf16
product). Weights are random and rotate through more memory than the last-level cache. A wall time
is the median of many replays of one program that multiplies by all of them; small products wait
for their launches there. So the busy time, of all that the device did for a product as the profiler
saw it, counts where there is one. gemlite and bitsandbytes are timed beside where they are
installed. ``--smoke`` shows on any machine that the program works.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import other_libraries

from pallas_kernels.device_time import busy_seconds, copies_beyond_cache
from pallas_kernels.lut_matmul import IMPLEMENTATIONS, packed_matmul, prepack
from pallas_kernels.self_check import CHECKS, GROUP, Check, checks_here, random_weight

LLAMA_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LLAMA_70B = ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One line of the table; a dense product has 16 bits, and is its own base."""

    k: int
    n: int
    m: int
    bits: int
    implementation: str
    wall_us: float
    busy_us: float | None
    copy_fraction: float
    speedup: float
    transpose: bool = False

    @property
    def seconds(self) -> float:
        """The time that counts."""
        return (self.busy_us or self.wall_us) / 1e6


def timing(
    product: tuple, times: tuple[float, float | None], copy: float, base: float | None, **kind: Any
) -> Timing:
    """The line of one product ``(k, n, m, bits)``; prints it.

    ``times`` are the wall and the busy time in seconds, ``copy`` is the bandwidth in bytes a
    second and ``base`` the time of the dense product, None for that itself.
    """
    k, n, m, bits = product
    scales = 2 * (k // GROUP) * n if bits < 16 else 0
    wall, busy = times
    taken = busy or wall
    fraction = (k * n * bits / 8 + scales + 2 * m * (k + n)) / taken / copy
    row = Timing(
        *product,
        wall_us=wall * 1e6,
        busy_us=None if busy is None else busy * 1e6,
        copy_fraction=fraction,
        speedup=(base or taken) / taken,
        **kind,
    )
    print(row, flush=True)
    return row


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


def seconds_of(function: Any, *args: Any, copies: int) -> tuple[float, float | None]:
    """Wall and busy time of one of the ``copies`` products of a program."""
    wall = median_seconds(function, *args) / copies
    busy = busy_seconds(function, *args)
    return wall, None if busy is None else busy / copies


def copies_of(size: int) -> int:
    """Copies of a weight of ``size`` bytes that exceed the cache; a CPU is for smoke tests."""
    copies = copies_beyond_cache(size)
    return min(2, copies) if jax.default_backend() == "cpu" else copies


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


def check_all(name: str, cases: tuple[Check, ...]) -> list[dict]:
    """One implementation over a few shapes; prints what fails."""
    rows = []
    for case in cases:
        outcome = case.run(name)
        line = {"implementation": name, **dataclasses.asdict(case)}
        rows.append({**line, **dataclasses.asdict(outcome)})
        print(f"check {name:14s} {case}: {outcome.status} {outcome.result}", flush=True)
    return rows


def best_implementation(names: list[str]) -> str:
    """The first kernel for this platform that is right at the size of a model."""
    kernels = {"gpu": ("mosaic_gpu", "triton", "pallas_triton"), "tpu": ("mosaic_tpu",)}
    for name in kernels.get(jax.default_backend(), ()):
        if name not in names:
            continue
        outcome = Check(4, 16, k=4096).run(name)
        if outcome.status == "ok":
            return name
        print(f"{name} is not timed: {outcome.result}", flush=True)
    return "xla"


def time_dense(k: int, n: int, ms: tuple[int, ...], copy: float) -> Iterator[Timing]:
    """The bf16 product of one weight shape."""
    copies = copies_of(2 * k * n)
    keys = jax.random.split(jax.random.key(0), copies)
    weights = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys]
    product = jax.jit(lambda x, weights: [x @ w for w in weights])
    for m in ms:
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        times = seconds_of(product, x, weights, copies=copies)
        yield timing((k, n, m, 16), times, copy, None, implementation="dense bf16")


def time_packed(
    name: str, k: int, n: int, bits: int, dense: dict[int, float], copy: float
) -> Iterator[Timing]:
    """Products with a prepacked weight; for Hopper, whose words serve both, the transposed too."""
    copies = copies_of(k * n * bits // 8)
    pack_one = jax.jit(functools.partial(prepack, k=k, group_size=GROUP, implementation=name))
    keys = jax.random.split(jax.random.key(0), copies)
    weights = [pack_one(*random_weight(key, k, n, bits)) for key in keys]
    for transpose in (False, True) if name == "mosaic_gpu" else (False,):
        one = jax.jit(functools.partial(packed_matmul, transpose=transpose))  # lowered once
        run = jax.jit(lambda x, weights, one=one: [one(x, w) for w in weights])
        for m in [m for m in dense if not transpose or m >= 512]:
            shape = (m, n if transpose else k)
            x = jax.random.normal(jax.random.key(m), shape, jnp.bfloat16)
            try:
                times = seconds_of(run, x, weights, copies=copies)
            except Exception as error:
                print(f"{k}x{n} m{m} b{bits} FAILED {type(error).__name__}: {str(error)[:300]}")
                continue
            kind = {"implementation": name, "transpose": transpose}
            yield timing((k, n, m, bits), times, copy, dense[m], **kind)


def time_others(k: int, n: int, dense: dict[int, float], copy: float) -> Iterator[Timing]:
    """Other libraries' 4-bit products, where they can run."""
    for name in other_libraries.LIBRARIES:
        reason = other_libraries.missing(name)
        if reason is not None:
            print(reason)
            continue
        copies = copies_of(k * n // 2)
        try:
            found = other_libraries.seconds(name, k, n, tuple(dense), group=GROUP, copies=copies)
        except Exception as error:
            print(f"{name} FAILED {type(error).__name__}: {str(error)[:300]}")
            continue
        for m, seconds in found.items():
            yield timing((k, n, m, 4), (seconds, None), copy, dense[m], implementation=name)


def time_shape(
    name: str, k: int, n: int, ms: tuple[int, ...], bits: tuple[int, ...], copy: float
) -> Iterator[Timing]:
    """Dense and compressed products of one weight shape."""
    dense = {}
    for row in time_dense(k, n, ms, copy):
        dense[row.m] = row.seconds
        yield row
    for b in bits:
        yield from time_packed(name, k, n, b, dense, copy)
    yield from time_others(k, n, dense, copy)


def markdown(report: dict) -> str:
    """The report as tables."""
    ceilings = []
    if "product_flops" in report:
        ceilings = [
            f"Ceilings of this run: copy {report['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + "
            f"written), bf16 product {report['product_flops'] / 1e12:.0f} TFLOP/s.",
            "",
        ]
    lines = [
        f"# lut_matmul on {report['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        *ceilings,
        "| K | N | M | bits | implementation | wall us | busy us | fraction of copy | over bf16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for t in report["timings"]:
        lines.append(
            f"| {t['k']} | {t['n']} | {t['m']} | {t['bits']} | {t['implementation']}"
            f"{', transposed' if t['transpose'] else ''} | "
            f"{t['wall_us']:.1f} | {'' if t['busy_us'] is None else format(t['busy_us'], '.1f')} | "
            f"{t['copy_fraction']:.2f} | {t['speedup']:.2f} |"
        )
    lines += ["", "| implementation | product | status | error or reason |", "|---|---|---|---|"]
    for c in report["checks"]:
        result = c["result"] if isinstance(c["result"], str) else f"{c['result']:.1e}"
        check = Check(**{f.name: c[f.name] for f in dataclasses.fields(Check)})
        lines.append(f"| {c['implementation']} | {check} | {c['status']} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, four M: a few minutes")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--times-only", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one of each")
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="of the weights that are timed")
    args = parser.parse_args()
    device = jax.devices()[0]
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"kernels-{device.device_kind.lower().replace(' ', '-')}.json"
    report: dict[str, Any] = {
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "smoke": args.smoke,
        "checks": [],
        "timings": [],
    }

    def write() -> None:  # after every line: the next one may run out of time
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(report))

    if not args.times_only:
        cases = CHECKS[:1] if args.smoke else checks_here()
        for name in args.implementations:
            report["checks"] += check_all(name, cases)
            write()
    tiny = args.smoke or jax.default_backend() == "cpu"
    shapes: tuple[tuple[int, int], ...] = ((256, 512),) if tiny else LLAMA_8B + LLAMA_70B
    ms: tuple[int, ...] = (1, 16) if tiny else ROWS
    bits: tuple[int, ...] = (4,) if tiny else (4, 3, 2)
    if args.quick and not tiny:
        shapes, ms = ((4096, 4096), (4096, 28672)), (1, 16, 64, 512)
    if args.shapes:
        shapes = tuple((int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes))
    if not args.checks_only:
        report |= {"copy_bytes_per_second": copy_bandwidth(), "product_flops": product_flops()}
        best = best_implementation(args.implementations)
        for k, n in shapes:
            for row in time_shape(best, k, n, ms, bits, report["copy_bytes_per_second"]):
                report["timings"].append(dataclasses.asdict(row))
                write()
    print(markdown(report))
    return int(any(c["status"] == "FAILED" for c in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
