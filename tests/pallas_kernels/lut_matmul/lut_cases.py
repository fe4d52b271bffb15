"""The one list of cases that every implementation must pass, and the oracle for them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import pack

# Relative Frobenius error: a few roundings of weight and result to the activation dtype (unit
# roundoff 2^-9, 2^-11, 2^-24) plus float32 accumulation.
TOLERANCE = {"bfloat16": 1.1e-2, "float16": 2e-3, "float32": 1e-5}


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

    def __str__(self) -> str:
        flags = "".join(
            f"-{flag}"
            for flag, on in (
                ("offsets", self.offsets),
                ("channel", self.tables == "channel"),
                (f"p{self.p}", self.p > 1),
                ("transposed", self.transpose),
                (f"s{self.scale_dtype}", self.scale_dtype != "float32"),
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
    return {
        "x": jnp.asarray(rng.standard_normal((case.m, contracted)), case.dtype),
        "words": pack(jnp.asarray(codes), case.bits),
        "scales": jnp.asarray(0.5 + rng.random(groups), scale_dtype),
        "lut": jnp.asarray(lut, jnp.float32),
        "offsets": jnp.asarray(rng.standard_normal(groups), scale_dtype) if case.offsets else None,
        "codes": codes,
    }


def operands(data: dict) -> tuple:
    """The positional arguments of ``lut_matmul``."""
    return tuple(data[name] for name in ("x", "words", "scales", "lut", "offsets"))


def oracle_weight(case: Case, data: dict) -> np.ndarray:
    """The dense weight in float64, from the formula, by loops over nothing but numpy indexing."""
    codes, lut = data["codes"], np.asarray(data["lut"], np.float64)
    k = np.arange(case.k)[:, None]
    n = np.arange(case.n)[None, :]
    table = n if case.tables == "channel" else 0
    group = k // case.group_size
    weight = lut[table, codes[k // case.p, n], k % case.p]
    weight = weight * np.asarray(data["scales"], np.float64)[group, n]
    if data["offsets"] is not None:
        weight = weight + np.asarray(data["offsets"], np.float64)[group, n]
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
