"""The implementations of the sparse product, and which of them a platform prefers."""

from __future__ import annotations

from pallas_kernels.operation import Operation

SPARSE_MATMUL = Operation(
    "sparse_matmul",
    implementations=("reference", "masked", "xla", "cpu_native", "pallas_triton", "mosaic_tpu"),
    preference={
        "cpu": ("cpu_native", "xla"),
        "cuda": ("pallas_triton",),
        "tpu": ("mosaic_tpu",),
    },
    fallback="masked",
)
