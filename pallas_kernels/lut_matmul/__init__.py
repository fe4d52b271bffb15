"""Products of activations with packed lookup-table weights."""

from pallas_kernels.lut_matmul.api import IMPLEMENTATIONS, lut_matmul
from pallas_kernels.lut_matmul.columns import take_columns
from pallas_kernels.lut_matmul.equally_spaced import zero_of_line
from pallas_kernels.lut_matmul.packed import (
    packed_columns,
    packed_matmul,
    packed_matmul_grouped,
    prepack,
)
from pallas_kernels.lut_matmul.packed_weight import PackedWeight
from pallas_kernels.lut_matmul.reference import dequantize
from pallas_kernels.platforms import interpret_kernels

__all__ = [
    "IMPLEMENTATIONS",
    "PackedWeight",
    "dequantize",
    "interpret_kernels",
    "lut_matmul",
    "packed_columns",
    "packed_matmul",
    "packed_matmul_grouped",
    "prepack",
    "take_columns",
    "zero_of_line",
]
