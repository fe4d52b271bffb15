"""The implementations of the lookup-table product, and which of them a platform prefers."""

from __future__ import annotations

from pallas_kernels.operation import Operation
from pallas_kernels.scales import expanded

# Rows of x from which the fallback, which dequantises tiles of canonical words and multiplies them
# as dense matrices, is faster than a kernel. Wall times at 4096 x 28672, 4 bits, M = 16 and 512 on
# an H100: XLA 0.49 and 0.75 ms, triton 0.09 and 0.68, and its time grows with the rows; on an H200
# pallas_triton 0.36 and 4.1. Other shapes, the transposed product and other GPUs were not timed.
_DENSE_ROWS = {"triton": 512, "pallas_triton": 32}

# The same for the transposed native kernel, which backward passes use: 11.1 against 5.5 ms of
# processor time at M = 512, 2.7 against 2.0 at 128.
_DENSE_ROWS_TRANSPOSED = {**_DENSE_ROWS, "cpu_native": 128}


def _loses(name: str, arrays: tuple, static: dict) -> bool:
    limits = _DENSE_ROWS_TRANSPOSED if static["transpose"] else _DENSE_ROWS
    return name in limits and arrays[0].shape[0] >= limits[name]


def _operands(name: str, arrays: tuple) -> tuple:
    """Only the kernels in C++ read scales and offsets that are quantised themselves."""
    return arrays if name == "cpu_native" else expanded(arrays)


LUT_MATMUL = Operation(
    "lut_matmul",
    implementations=(
        "reference",
        "xla",
        "cpu_native",
        "pallas_triton",
        "mosaic_gpu",
        "mosaic_tpu",
        "triton",
    ),
    # For canonical words. The Hopper kernel is the best for prepacked words only: reordering them
    # costs more than Triton's slower lookups.
    preference={
        "cpu": ("cpu_native",),
        "cuda": ("triton", "pallas_triton", "mosaic_gpu"),
        "tpu": ("mosaic_tpu",),
    },
    fallback="xla",
    loses=_loses,
    operands=_operands,
    interpretable=True,
)
