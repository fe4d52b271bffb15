"""The one list of cases that every implementation must pass, and the oracle for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import pack
from pallas_kernels.sparse_matmul import BlockCodes, RowCodes, pack_rows
from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL

# Relative Frobenius error: a few roundings of weight and result to the activation dtype (unit
# roundoff 2^-9, 2^-11, 2^-24) plus float32 accumulation.
TOLERANCE = {"bfloat16": 1.1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; ``str`` is the test id. ``bits=0`` is a dense weight."""

    m: int = 1
    k: int = 96
    n: int = 256
    bits: int = 0
    group_size: int = 32
    lanes: int | None = None
    canonical: bool = False  # words as lut_matmul takes them instead of rows on their own
    dtype: str = "bfloat16"
    per_row: bool = False
    offsets: bool = False
    tables: int = 1
    tiled: bool = False  # the dense weight as [K, N / 128, 128]
    sparsity: float = 0.5

    def __str__(self) -> str:
        layout = "canonical" if self.canonical else f"l{self.lanes}"
        kind = f"{self.bits}b-g{self.group_size}-{layout}" if self.bits else "dense"
        flags = "".join(
            f"-{flag}"
            for flag, on in (
                ("rows", self.per_row),
                ("offsets", self.offsets),
                ("channel", self.tables > 1),
                ("tiled", self.tiled),
                (f"s{self.sparsity}", self.sparsity != 0.5),
            )
            if on
        )
        return f"{kind}-m{self.m}-k{self.k}-n{self.n}-{self.dtype}{flags}"


CASES = [
    *(Case(dtype=d) for d in ("bfloat16", "float16", "float32")),
    *(Case(m=m, per_row=True) for m in (2, 3, 4, 8)),
    Case(m=9),
    Case(k=200, n=72, dtype="float32"),  # nothing is a multiple of a tile
    Case(k=77, n=33, m=3, dtype="float32", per_row=True),
    *(Case(sparsity=s, dtype="float32") for s in (0.0, 0.9, 1.0)),
    Case(tiled=True, dtype="float32"),
    Case(tiled=True, m=4, per_row=True),
    *(Case(bits=b, lanes=lanes) for b in (2, 3, 4) for lanes in (32, 128)),
    *(Case(bits=b, dtype="float32") for b in (2, 3, 4)),
    Case(bits=4, dtype="float16"),
    Case(bits=8, dtype="float32", m=2),
    Case(bits=4, lanes=128, m=4, per_row=True, dtype="float32"),
    Case(bits=3, lanes=128, k=200, n=500, group_size=96, offsets=True, dtype="float32"),
    Case(bits=3, lanes=32, k=200, n=500, group_size=96, offsets=True, m=2, dtype="float32"),
    Case(bits=2, lanes=16, k=77, n=33, group_size=77, dtype="float32"),
    Case(bits=4, lanes=32, n=512, offsets=True, per_row=True, dtype="float32"),
    Case(bits=4, tables=256, dtype="float32", m=2),
    Case(bits=4, lanes=128, sparsity=1.0, dtype="float32"),
    Case(bits=4, lanes=32, k=256, group_size=256, dtype="float32"),
    *(Case(bits=b, canonical=True, n=584, dtype="float32") for b in (2, 3, 4, 8)),
    *(Case(bits=b, canonical=True, k=77, n=33, m=2, per_row=True) for b in (2, 3, 4)),
    *(Case(bits=3, canonical=True, n=300, m=m, offsets=True, dtype="float32") for m in (1, 3, 4)),
    Case(bits=3, canonical=True, k=200, n=96, group_size=88, dtype="float32"),
    Case(bits=4, canonical=True, n=96, tables=96, offsets=True, dtype="float16"),
    *(Case(bits=4, canonical=True, sparsity=s, dtype="float32") for s in (0.0, 1.0)),
    Case(bits=4, canonical=True, m=9, per_row=True, dtype="float32"),
]


def make(case: Case, seed: int = 0) -> tuple[tuple, np.ndarray]:
    """Random operands ``(x, weight, thresholds)`` of a case, and the dense weight in float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.m, case.k))
    x[:, 3] = 0
    level = float(np.quantile(np.abs(x), case.sparsity)) if case.sparsity else 0.0
    width = case.k if case.per_row else 1
    thresholds = level * (0.5 + rng.random(width) if case.sparsity < 1 else 2)
    thresholds = jnp.asarray(np.broadcast_to(thresholds, width), jnp.float32)
    x = jnp.asarray(x, case.dtype)
    if not case.bits:
        dense = jnp.asarray(rng.standard_normal((case.k, case.n)), case.dtype)
        weight: Any = dense.reshape(case.k, -1, 128) if case.tiled else dense
        return (x, weight, thresholds), np.asarray(dense, np.float64)
    codes = rng.integers(0, 2**case.bits, (case.k, case.n))
    groups = -(-case.k // case.group_size)
    lut = rng.standard_normal((case.tables, 2**case.bits, 1)).astype(jnp.bfloat16)
    scales = 0.5 + rng.random((groups, case.n)).astype(np.float32)
    offsets = rng.random((groups, case.n)).astype(np.float32) if case.offsets else None
    fields = (
        jnp.asarray(scales),
        jnp.asarray(lut, jnp.float32),
        None if offsets is None else jnp.asarray(offsets),
    )
    if case.canonical:
        words = pack(jnp.asarray(codes), case.bits)
        weight = BlockCodes(words, *fields, case.k, case.group_size)
    else:
        weight = RowCodes(
            pack_rows(jnp.asarray(codes), case.bits, case.lanes), *fields, case.group_size
        )
    column = np.arange(case.n)[None, :] if case.tables > 1 else 0
    group = np.arange(case.k) // case.group_size
    dense = lut.astype(np.float64)[column, codes, 0] * scales.astype(np.float64)[group]
    return (x, weight, thresholds), dense + (0 if offsets is None else offsets[group])


def oracle(operands: tuple, dense: np.ndarray) -> np.ndarray:
    """The product in float64, from the formula."""
    x, thresholds = np.asarray(operands[0], np.float64), np.asarray(operands[2], np.float64)
    return np.where(np.abs(x) > thresholds[None], x, 0) @ dense


def run(name: str, operands: tuple) -> jax.Array | str:
    """The product by an implementation, interpreted if it is a kernel; or its reason against."""
    module = SPARSE_MATMUL.backend(name)
    assert not isinstance(module, str), module
    reason = module.supports(*operands)
    if reason is not None:
        return reason
    options: dict[str, Any] = {}
    if name == "pallas_triton":
        options["interpret"] = True
    if name == "mosaic_tpu":
        options["interpret"] = pltpu.InterpretParams()
    return jax.jit(lambda *a: module.sparse_matmul(*a, **options))(*operands)


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))
