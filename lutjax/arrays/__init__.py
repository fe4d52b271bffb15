"""Compressed arrays: what stands in a parameter pytree where a dense weight stood."""

from lutjax.arrays.base import CompressedArray, format_bytes, has_compressed, is_compressed
from lutjax.arrays.concat_array import ConcatArray
from lutjax.arrays.dense_array import DenseArray
from lutjax.arrays.gated import GatedArray
from lutjax.arrays.low_rank import LowRankArray
from lutjax.arrays.lut_array import LutArray
from lutjax.arrays.packed_lut_array import PackedLutArray
from lutjax.arrays.product_array import ProductArray
from lutjax.arrays.reordered import ReorderedArray
from lutjax.arrays.rotated import RotatedArray
from lutjax.arrays.row_dense_array import RowDenseArray
from lutjax.arrays.row_lut_array import RowLutArray
from lutjax.arrays.scales import DoubleQuant, QuantizedScales, quantize_scales, quantize_scales_like
from lutjax.arrays.sharding import shardings_like
from lutjax.arrays.side_by_side import side_by_side
from lutjax.arrays.sum_array import SumArray
from lutjax.arrays.view import MatrixView
from lutjax.arrays.wrapper import WrapperArray

__all__ = [
    "CompressedArray",
    "ConcatArray",
    "DenseArray",
    "DoubleQuant",
    "GatedArray",
    "LowRankArray",
    "LutArray",
    "MatrixView",
    "PackedLutArray",
    "ProductArray",
    "QuantizedScales",
    "ReorderedArray",
    "RotatedArray",
    "RowDenseArray",
    "RowLutArray",
    "SumArray",
    "WrapperArray",
    "format_bytes",
    "has_compressed",
    "is_compressed",
    "quantize_scales",
    "quantize_scales_like",
    "shardings_like",
    "side_by_side",
]
