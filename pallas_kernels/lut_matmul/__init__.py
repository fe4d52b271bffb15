"""Products of activations with packed lookup-table weights."""

from pallas_kernels.lut_matmul.api import IMPLEMENTATIONS, lut_matmul
from pallas_kernels.lut_matmul.reference import dequantize

__all__ = ["IMPLEMENTATIONS", "dequantize", "lut_matmul"]
