"""Compressed arrays: what stands in a parameter pytree where a dense weight stood."""

from lutjax.arrays.base import CompressedArray, format_bytes, is_compressed
from lutjax.arrays.low_rank import LowRankArray
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.scales import DoubleQuant, QuantizedScales, quantize_scales
from lutjax.arrays.sum_array import SumArray
from lutjax.arrays.view import MatrixView

__all__ = [
    "CompressedArray",
    "DoubleQuant",
    "LowRankArray",
    "LutArray",
    "MatrixView",
    "QuantizedScales",
    "SumArray",
    "format_bytes",
    "is_compressed",
    "quantize_scales",
]
