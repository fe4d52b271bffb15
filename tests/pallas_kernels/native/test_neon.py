"""The NEON kernels, emulated, against the formula."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

REASON = "pip install 'lutjax[arm]' for the cross compiler and the emulator"
pytest.importorskip("ziglang", reason=REASON)
pytest.importorskip("unicorn", reason=REASON)

from neon_emulator import (  # noqa: E402
    DenseProblem,
    Emulator,
    Live,
    Problem,
    Scales,
    compile_program,
)

from pallas_kernels.layout import pack  # noqa: E402

PRODUCT, TRANSPOSED, SPARSE, SPARSE_DENSE = range(4)
SCALE_TYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(compile_program(tmp_path_factory.mktemp("neon")))


def scales_of(emulator, values):
    """Plain scales in the emulator's memory; none if there are no values."""
    if values is None:
        return Scales()
    return Scales(values=emulator.put(values), type=SCALE_TYPES.index(values.dtype.type))


def quantized(rng, emulator, groups, n, form):
    """Random quantised scales in the emulator's memory, and in float64."""
    bits, rows, columns, zero, floor, dtype = form
    codes = rng.integers(0, 2**bits, (groups, n))
    steps = (0.5 + rng.random((-(-groups // rows), -(-n // columns)))).astype(dtype)
    scales = Scales(
        emulator.put(steps), emulator.put(np.asarray(pack(codes, bits))),
        SCALE_TYPES.index(dtype), bits, zero, floor, rows, columns,
    )  # fmt: skip
    step = steps.astype(np.float64)[np.arange(groups)[:, None] // rows, np.arange(n) // columns]
    return scales, floor + (codes - zero) * step


def weight(
    rng, emulator, k, n, bits, group, *,
    tables=1, offsets=False, values=None, dtype=np.float32, form=None,
):  # fmt: skip
    """The fields of a packed weight, and the dense matrix in float64."""
    codes = rng.integers(0, 2**bits, (k, n))
    lut = rng.standard_normal((tables, 2**bits)).astype(np.float32)
    if values == "integers":
        lut[:] = np.arange(2**bits) - 2 ** (bits - 1)
    elif values == "float8":
        lut[:] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
        lut[:, [0x7F, 0xFF]] = 480, -480  # NaN
    groups = -(-k // group)
    if form is None:
        plain = (0.5 + rng.random((groups, n))).astype(dtype)
        shifts = rng.random((groups, n)).astype(dtype) if offsets else None
        scales, shift_scales = (scales_of(emulator, values) for values in (plain, shifts))
    else:
        scales, plain = quantized(rng, emulator, groups, n, form)
        shift_scales, shifts = quantized(rng, emulator, groups, n, form)
    at = np.arange(k) // group
    column = np.arange(n)[None] if tables > 1 else 0
    dense = lut[column, codes].astype(np.float64) * plain.astype(np.float64)[at]
    if shifts is not None:
        dense = dense + shifts.astype(np.float64)[at]
    fields = {"words": emulator.put(np.asarray(pack(codes, bits))), "lut": emulator.put(lut)}
    fields |= {"scales": scales, "offsets": shift_scales}
    fields |= {"n": n, "rows": k, "group": group, "tables": tables, "bits": bits}
    return fields, shifts is not None, dense


def error(actual, expected):
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


CASES = [
    *((m, 72, 70, 4, {}) for m in (1, 2, 3, 4, 5, 13)),
    *((1, 77, 150, bits, {"offsets": True}) for bits in (1, 2, 3, 6, 8)),
    *((m, 77, 33, bits, {"tables": 33}) for bits in (2, 3, 4, 5, 8) for m in (1, 6)),
    *((m, 64, 40, 8, {"values": values}) for m in (1, 6) for values in ("integers", "float8")),
    (1, 200, 300, 4, {"dtype": ml_dtypes.bfloat16}),
    (9, 200, 40, 3, {"dtype": ml_dtypes.bfloat16, "offsets": True}),
    (1, 200, 50, 4, {"dtype": np.float16, "offsets": True}),
    *((m, 500, 42, 4, {"form": (6, 8, 1, 0, 0.0, np.float16)}) for m in (1, 6)),
    (2, 500, 70, 3, {"form": (8, 1, 20, 0, 0.5, ml_dtypes.bfloat16)}),
    (1, 500, 33, 6, {"form": (3, 3, 1, 4, 0.0, np.float32)}),
]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("m,k,n,bits,options", CASES, ids=str)
def test_products(emulator, m, k, n, bits, options, transpose):
    rng = np.random.default_rng(bits)
    fields, shifted, dense = weight(rng, emulator, k, n, bits, 32, **options)
    padded = 8 * -(-k // 8)
    x = rng.standard_normal((m, n if transpose else k)).astype(np.float32)
    rows = x if transpose else np.pad(x, ((0, 0), (0, padded - k)))
    sums = None
    if shifted and not transpose:
        starts = np.arange(0, padded, 32)
        sums = np.add.reduceat(rows, starts, axis=1, dtype=np.float32)
    y = np.full((m, k if transpose else n), np.nan, np.float32)
    at = emulator.put(y)
    problem = Problem(x=emulator.put(rows), y=at, sums=emulator.put(sums), m=m, k=padded, **fields)
    emulator.run(TRANSPOSED if transpose else PRODUCT, problem=problem)
    expected = x.astype(np.float64) @ (dense.T if transpose else dense)
    assert error(emulator.get(at, y.shape), expected) < 1e-5  # sums in float32


def live_rows(x, dead, bits, group, n):
    """What the handler passes: rows of a group, those within a byte first."""
    rows, values, ends = [], [], []
    for first in range(0, x.shape[1], group):
        for crosses in (False, True):
            for k in range(first, min(first + group, x.shape[1])):
                byte, shift = divmod(k * bits, 8) if bits else (k, 0)
                if dead[k] or (bits and shift + bits > 8) != crosses:
                    continue
                rows.append((byte * n, shift))
                values.append(x[:, k])
            ends.append(len(rows))
    kind = np.dtype([("start", np.int64), ("shift", np.int32), ("", np.int32)])
    table = np.zeros(len(rows) + 1, kind)
    table["start"][:-1], table["shift"][:-1] = zip(*rows, strict=True)
    return table, np.array(values, np.float32), np.array(ends, np.int64)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "bits,values",
    [
        (1, None),
        (2, None),
        (3, None),
        (4, None),
        (7, None),
        (8, None),
        (8, "integers"),
        (8, "float8"),
    ],
)
def test_sparse_products_with_packed_weights(emulator, bits, values, m):
    rng = np.random.default_rng(m)
    k, n, group = 150, 70, 20
    form = (5, 2, 1, 9, 0.25, np.float16) if bits == 7 else None
    options = {"offsets": True, "values": values, "form": form}
    fields, _, dense = weight(rng, emulator, k, n, bits, group, **options)
    dead = rng.random(k) < 0.5
    x = np.where(dead, 0, rng.standard_normal((m, k))).astype(np.float32)
    table, values, ends = live_rows(x, dead, bits, group, n)
    sums = np.add.reduceat(x, np.arange(0, k, group), axis=1, dtype=np.float32)
    at = emulator.put(np.full((m, n), np.nan, np.float32))
    problem = Problem(y=at, sums=emulator.put(sums), m=m, k=k, **fields)
    live = Live(emulator.put(table), emulator.put(values), emulator.put(ends), len(values))
    emulator.run(SPARSE, problem=problem, live=live)
    assert error(emulator.get(at, (m, n)), x.astype(np.float64) @ dense) < 1e-5


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_sparse_products_with_dense_weights(emulator, dtype, m):
    rng = np.random.default_rng(m)
    k, n = 77, 203
    dense = rng.standard_normal((k, n)).astype(dtype)
    dead = rng.random(k) < 0.5
    x = np.where(dead, 0, rng.standard_normal((m, k))).astype(np.float32)
    table, values, ends = live_rows(x, dead, 0, k, n)
    at = emulator.put(np.full((m, n), np.nan, np.float32))
    problem = DenseProblem(emulator.put(dense), at, m, n, dtype != np.float32)
    live = Live(emulator.put(table), emulator.put(values), emulator.put(ends), len(values))
    emulator.run(SPARSE_DENSE, dense=problem, live=live)
    expected = x.astype(np.float64) @ dense.astype(np.float64)
    assert error(emulator.get(at, (m, n)), expected) < 1e-5
