"""The implementations of the sparse product, and which of them a platform prefers."""

from __future__ import annotations

from pallas_kernels.operation import Operation
from pallas_kernels.scales import expanded
from pallas_kernels.sparse_matmul.blocks import BlockCodes


def _operands(name: str, arrays: tuple) -> tuple:
    """Only C++ reads quantised scales; ``masked`` calls a product that may be it."""
    x, weight, thresholds = arrays
    if name in ("cpu_native", "masked") or not isinstance(weight, BlockCodes):
        return arrays
    return x, expanded(weight), thresholds


SPARSE_MATMUL = Operation(
    "sparse_matmul",
    implementations=("reference", "masked", "xla", "cpu_native", "pallas_triton", "mosaic_tpu"),
    preference={
        "cpu": ("cpu_native", "xla"),
        "cuda": ("pallas_triton",),
        "tpu": ("mosaic_tpu",),
    },
    fallback="masked",
    operands=_operands,
)
