"""Times of other libraries' 4-bit products on the same GPU, where they are installed.

gemlite (A16W4 in Triton) and bitsandbytes (NF4) multiply ``x [M, K]`` by a random weight of
``[K, N]``. Copies of the weight rotate as in ``kernels.py``; the median of CUDA event times counts.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

Product = Callable[[Any], Any]


def missing(name: str) -> str | None:
    """Why a library is left out, or None if it can run."""
    for module in ("torch", name):
        if importlib.util.find_spec(module) is None:
            return f"{name} is left out: {module} is not installed (pip install {name})"
    import torch

    return None if torch.cuda.is_available() else f"{name} is left out: torch sees no GPU"


def gemlite_products(k: int, n: int, group: int, copies: int) -> list[Product]:
    """Products with random 4-bit weights, a bfloat16 scale and zero a group."""
    import torch
    from gemlite.helper import A16Wn

    layers = []
    for _ in range(copies):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand((n, k // group), dtype=torch.bfloat16, device="cuda") + 0.5
        zeros = torch.full_like(scales, 8.0)
        layers.append(A16Wn(device="cuda:0").from_weights(codes, scales, zeros, 4, group))
    return layers


def bitsandbytes_products(k: int, n: int, group: int, copies: int) -> list[Product]:
    """Products with NF4 weights; blocks of 64, the usual ones, whatever ``group`` is."""
    import bitsandbytes
    import torch

    del group

    def product() -> Product:
        dense = torch.randn((n, k), dtype=torch.bfloat16, device="cuda")
        packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4")
        return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)

    return [product() for _ in range(copies)]


LIBRARIES = {"gemlite": gemlite_products, "bitsandbytes": bitsandbytes_products}


def seconds(name: str, k: int, n: int, rows: tuple[int, ...], *, group: int, copies: int) -> dict:
    """Median seconds of a product by number of rows."""
    import torch

    products = LIBRARIES[name](k, n, group, copies)
    medians = {}
    for m in rows:
        x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda")
        times = []
        for i in range(13):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for product in products:
                product(x)
            end.record()
            torch.cuda.synchronize()
            if i >= 3:  # the first compile and tune
                times.append(begin.elapsed_time(end) / 1e3 / len(products))
        medians[m] = statistics.median(times)
    return medians
