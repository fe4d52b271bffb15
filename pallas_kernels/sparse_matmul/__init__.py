"""Products that ignore small activations and do not read the rows of the weight they meet."""

from pallas_kernels.sparse_matmul.api import IMPLEMENTATIONS, sparse_matmul
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.masked import row_matmul
from pallas_kernels.sparse_matmul.rows import (
    KERNEL_LANES,
    RowCodes,
    dequantize_rows,
    pack_rows,
    unpack_rows,
)

__all__ = [
    "IMPLEMENTATIONS",
    "KERNEL_LANES",
    "BlockCodes",
    "RowCodes",
    "dequantize_rows",
    "pack_rows",
    "row_matmul",
    "sparse_matmul",
    "unpack_rows",
]
