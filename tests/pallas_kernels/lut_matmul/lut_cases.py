"""The one list of cases that every implementation must pass, and the oracle for them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import pack
from pallas_kernels.scales import QuantizedScales

# Relative Frobenius error: a few roundings of weight and result to the activation dtype (unit
# roundoff 2^-9, 2^-11, 2^-24) plus float32 accumulation.
TOLERANCE = {"bfloat16": 1.1e-2, "float16": 2e-3, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Form:
    """How scales are quantised themselves."""

    bits: int
    block: tuple[int, int]
    zero: int = 0
    floor: bool = False

    def __str__(self) -> str:
        floor = "floor" if self.floor else ""
        return f"{self.bits}b{self.block[0]}x{self.block[1]}z{self.zero}{floor}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; ``str`` is the test id."""

    m: int = 4
    k: int = 256
    n: int = 128
    bits: int = 4
    group_size: int = 64
    dtype: str = "bfloat16"
    offsets: bool = False
    tables: str = "shared"  # or "channel"
    p: int = 1
    transpose: bool = False
    scale_dtype: str = "float32"
    form: Form | None = None

    def __str__(self) -> str:
        flags = "".join(
            f"-{flag}"
            for flag, on in (
                ("offsets", self.offsets),
                ("channel", self.tables == "channel"),
                (f"p{self.p}", self.p > 1),
                ("transposed", self.transpose),
                (f"s{self.scale_dtype}", self.scale_dtype != "float32"),
                (f"s{self.form}", self.form is not None),
            )
            if on
        )
        return f"{self.bits}b-m{self.m}-k{self.k}-n{self.n}-g{self.group_size}-{self.dtype}{flags}"

    @property
    def static(self) -> dict:
        return {"k": self.k, "group_size": self.group_size, "transpose": self.transpose}


CASES = [
    *(Case(bits=b, group_size=64) for b in (2, 3, 4, 8)),
    *(Case(group_size=g, k=512) for g in (32, 128, 256, 512)),
    *(Case(dtype=d, bits=b) for d in ("float16", "float32") for b in (2, 3, 4)),
    Case(bits=8, dtype="float32"),
    Case(k=576, group_size=128, n=192),  # a last group that is shorter
    Case(k=200, group_size=96, n=72, bits=3),  # nothing is a multiple of a tile
    Case(k=77, group_size=77, n=33, m=5, bits=2),  # one group a column, K not a multiple of 8
    Case(k=77, group_size=32, n=33, m=3, dtype="float32"),
    Case(m=1),
    Case(m=1, bits=3, n=256, scale_dtype="bfloat16"),
    Case(m=16, bits=2, k=1024, n=384, group_size=128, scale_dtype="bfloat16"),
    Case(m=33),
    Case(m=130, k=320, n=200),
    Case(m=600, k=256, n=256, group_size=128),
    Case(offsets=True),
    Case(offsets=True, bits=3, k=200, group_size=64, n=72, dtype="float32"),
    Case(offsets=True, bits=8, dtype="float16"),
    Case(tables="channel"),
    Case(tables="channel", bits=3, dtype="float32", n=72),
    Case(p=2, bits=4),
    Case(p=2, bits=4, k=202, group_size=32, n=72, dtype="float32"),
    Case(transpose=True),
    Case(transpose=True, bits=3, k=200, group_size=96, n=72, dtype="float32"),
    Case(transpose=True, bits=2, m=33, k=320, n=200, offsets=True),
    Case(transpose=True, p=2, dtype="float16"),
    Case(transpose=True, m=1, bits=4, k=576, n=192, group_size=128),
]

_K_TYPE = Form(6, (8, 1))  # Q4_K, Q5_K; then Q6_K, Q3_K and a block that is no power of two
_SIGNED = Form(8, (16, 1), zero=128), Form(6, (16, 1), zero=32), Form(3, (3, 1), zero=2)
_LQ = Form(8, (1, 256), floor=True), Form(4, (1, 64), floor=True), Form(5, (2, 20), floor=True)
QUANTIZED = [
    *(
        Case(m=m, n=n, k=k, group_size=g, dtype="float32", scale_dtype=d, offsets=o, form=form)
        for form, d in [(_K_TYPE, "float16"), *((form, "float16") for form in _SIGNED)]
        for m, n, k, g, o in ((1, 600, 256, 16, True), (6, 33, 77, 8, False))
    ),
    *(
        Case(m=m, n=n, k=384, group_size=32, dtype="float32", scale_dtype=d, form=form)
        for form, d in zip(_LQ, ("float32", "bfloat16", "float16"), strict=True)
        for m, n in ((1, 600), (3, 300))
    ),
    Case(m=5, n=100, k=520, group_size=32, transpose=True, offsets=True, form=_K_TYPE),
    Case(m=2, n=40, k=96, group_size=32, p=2, bits=3, dtype="float32", form=_LQ[2]),
    Case(m=1, n=72, k=64, group_size=64, bits=8, dtype="float32", form=_SIGNED[0]),
]
"""Products with scales and offsets that are quantised themselves."""


def make(case: Case, seed: int = 0) -> dict:
    """Random arrays of a case (``x, words, scales, lut, offsets``) and the integer ``codes``."""
    rng = np.random.default_rng(seed)
    rows = -(-case.k // case.p)
    codes = rng.integers(0, 2**case.bits, (rows, case.n)).astype(np.uint8)
    tables = case.n if case.tables == "channel" else 1
    # Tables that every activation dtype holds exactly: kernels may keep them in that dtype.
    lut = rng.standard_normal((tables, 2**case.bits, case.p)).astype(jnp.bfloat16)
    groups = (-(-case.k // case.group_size), case.n)
    contracted = case.n if case.transpose else case.k
    scale_dtype = jnp.dtype(case.scale_dtype)
    expanded = {}
    if case.form is None:
        scales = jnp.asarray(0.5 + rng.random(groups), scale_dtype)
        offsets = jnp.asarray(rng.standard_normal(groups), scale_dtype)
    else:
        scales, expanded["scales"] = _quantized(rng, groups, case.form, scale_dtype)
        offsets, expanded["offsets"] = _quantized(rng, groups, case.form, scale_dtype)
    return {
        "x": jnp.asarray(rng.standard_normal((case.m, contracted)), case.dtype),
        "words": pack(jnp.asarray(codes), case.bits),
        "scales": scales,
        "lut": jnp.asarray(lut, jnp.float32),
        "offsets": offsets if case.offsets else None,
        "codes": codes,
        "expanded": expanded,
    }


def _quantized(
    rng: np.random.Generator, shape: tuple[int, int], form: Form, dtype: np.dtype
) -> tuple[QuantizedScales, np.ndarray]:
    """Random quantised scales, and in float64 what they stand for."""
    (groups, n), (rows, columns) = shape, form.block
    codes = rng.integers(0, 2**form.bits, shape).astype(np.uint8)
    steps = (0.5 + rng.random((-(-groups // rows), -(-n // columns)))).astype(dtype)
    floor = np.float32([[rng.random()]]) if form.floor else None
    packed = QuantizedScales(
        pack(jnp.asarray(codes), form.bits),
        jnp.asarray(steps),
        None if floor is None else jnp.asarray(floor),
        padding=-groups % 8,
        block=form.block,
        zero=form.zero,
    )
    g, i = np.arange(groups)[:, None], np.arange(n)
    step = steps.astype(np.float64)[g // rows, i // columns]
    plain = (codes.astype(np.float64) - form.zero) * step
    return packed, plain if floor is None else floor.astype(np.float64) + plain


def operands(data: dict) -> tuple:
    """The positional arguments of ``lut_matmul``."""
    return tuple(data[name] for name in ("x", "words", "scales", "lut", "offsets"))


def plain(data: dict, name: str) -> np.ndarray:
    """Scales or offsets in float64, whether they are quantised or not."""
    values = data["expanded"].get(name, data[name])
    return np.asarray(values, np.float64)


def oracle_weight(case: Case, data: dict) -> np.ndarray:
    """The dense weight in float64, from the formula, by loops over nothing but numpy indexing."""
    codes, lut = data["codes"], np.asarray(data["lut"], np.float64)
    k = np.arange(case.k)[:, None]
    n = np.arange(case.n)[None, :]
    table = n if case.tables == "channel" else 0
    group = k // case.group_size
    weight = lut[table, codes[k // case.p, n], k % case.p]
    weight = weight * plain(data, "scales")[group, n]
    if data["offsets"] is not None:
        weight = weight + plain(data, "offsets")[group, n]
    return weight


def oracle(case: Case, data: dict, *, transpose: bool | None = None) -> np.ndarray:
    """The product in float64; ``transpose`` overrides the case's."""
    weight = oracle_weight(case, data)
    transpose = case.transpose if transpose is None else transpose
    return np.asarray(data["x"], np.float64) @ (weight.T if transpose else weight)


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of ``expected``."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
