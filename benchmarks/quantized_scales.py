"""CPU products whose scales stay quantised, against the same scales expanded, in one run.

    python benchmarks/quantized_scales.py [--k 4096 --n 4096] [--rounds 15]

One row times weights of each type of GGUF with quantised scales, and of NormalFloat with double
quantisation. The scales are as they are stored, or float32 arrays, or (NormalFloat's) bfloat16. At
first one weight is multiplied again and again, which a cache holds; then many, which take more
memory than the last cache. Variants take turns. The time is divided by that with float32 scales:
the median of the ratios within a round, below 1 where float32 is slower.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cpu_matmul import ROTATED_BYTES, chain, seconds

from lutjax.arrays.scales import DoubleQuant, quantize_scales
from lutjax.codebooks import normal_float
from lutjax.io.blocks import ScaleForm
from lutjax.io.gguf_blocks import BLOCK_TYPES
from pallas_kernels.layout import BLOCK, packed_shape
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.scales import QuantizedScales, expanded

CACHED_PRODUCTS = 24
"""Products with one weight in a program."""


class Weight(NamedTuple):
    """Packed codes, scales and offsets, any of which may be those of one product."""

    words: jax.Array
    scales: jax.Array | QuantizedScales
    offsets: jax.Array | QuantizedScales | None


def coded_scales(rng: np.random.Generator, form: ScaleForm, groups: int, n: int) -> QuantizedScales:
    words = rng.integers(0, 256, packed_shape((groups, n), form.bits), np.uint8)
    steps = rng.random((-(-groups // form.block), n), np.float32).astype(form.dtype)
    parts = jnp.asarray(words), jnp.asarray(steps)
    return QuantizedScales(*parts, None, -groups % BLOCK, (form.block, 1), form.zero)


def variants(
    rng: np.random.Generator, name: str, k: int, n: int
) -> tuple[np.ndarray, int, dict[str, Weight]]:
    """The table, the group size, and one weight with its scales in each form."""
    if name == "NF4":
        levels, group = normal_float(4), 64
        plain = jnp.asarray(rng.random((-(-k // group), n), np.float32))
        scales, offsets = quantize_scales(plain, DoubleQuant()), None
    else:
        kind = BLOCK_TYPES[name]
        levels, group = np.asarray(kind.levels, np.float32), kind.group_size
        scales, offsets = (
            coded_scales(rng, kind.scales, -(-k // group), n) if there else None
            for there in (True, kind.has_offsets)
        )
    bits = (len(levels) - 1).bit_length()
    words = jnp.asarray(rng.integers(0, 256, packed_shape((k, n), bits), np.uint8))
    weights = {
        "quantised": Weight(words, scales, offsets),
        "float32": Weight(words, *expanded((scales, offsets))),
    }
    if name == "NF4":
        weights["bfloat16"] = Weight(words, scales.expand().astype(jnp.bfloat16), None)
    return levels, group, weights


def bits_a_weight(weight: Weight, k: int, n: int) -> float:
    return 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) / (k * n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    k, n = arguments.k, arguments.n
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, k), np.float32))
    load = os.getloadavg()[0]
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {load:.1f}, [{k}, {n}], one row")
    print(f"{'type':8}{'scales':11}{'bits':>7}", end="")
    print(f"{'cached us':>11}{'/ float32':>11}{'rotated us':>12}{'/ float32':>11}")
    coded = [name for name, kind in BLOCK_TYPES.items() if isinstance(kind.scales, ScaleForm)]
    for name in [*coded, "NF4"]:
        levels, group, weights = variants(rng, name, k, n)
        lut = jnp.asarray(levels, jnp.float32).reshape(1, -1, 1)

        @chain
        def product(x, weight, lut, group=group):
            return lut_matmul(
                x,
                weight.words,
                weight.scales,
                lut,
                k=k,
                group_size=group,
                offsets=weight.offsets,
                implementation="cpu_native",
            )

        programs = {}
        for form, weight in weights.items():
            copies = -(-ROTATED_BYTES // weight.words.nbytes)
            copied = [jax.tree.map(jnp.copy, weight) for _ in range(copies)]
            for place, chained in ("cached", [weight] * CACHED_PRODUCTS), ("rotated", copied):
                program = functools.partial(product, x, chained, lut)
                programs[place, form] = program, len(chained)
        for program in programs.values():
            seconds(*program)
        rounds = [
            {key: seconds(*program)[0] for key, program in programs.items()}
            for _ in range(arguments.rounds)
        ]
        for form, weight in weights.items():
            print(f"{name:8}{form:11}{bits_a_weight(weight, k, n):7.2f}", end="")
            for place, width in ("cached", 11), ("rotated", 12):
                us = 1e6 * min(times[place, form] for times in rounds)
                ratio = statistics.median(t[place, form] / t[place, "float32"] for t in rounds)
                print(f"{us:{width}.0f}{ratio:11.2f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
