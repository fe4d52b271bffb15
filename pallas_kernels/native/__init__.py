"""The C++ kernels for CPUs: how the library is found or built, loaded and registered with XLA."""

from pallas_kernels.native.loader import (
    LUT_MATMUL,
    SPARSE_DENSE,
    SPARSE_PACKED,
    availability,
    computes,
    instruction_sets,
    library_path,
)

__all__ = [
    "LUT_MATMUL",
    "SPARSE_DENSE",
    "SPARSE_PACKED",
    "availability",
    "computes",
    "instruction_sets",
    "library_path",
]
