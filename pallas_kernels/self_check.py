"""Runs the kernels that this machine has on small products, and compares them with float64.

``lutjax doctor --check`` prints it, and ``benchmarks/kernels.py`` keeps it in a report.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import BLOCK, pack, packed_shape
from pallas_kernels.lut_matmul import (
    dequantize,
    lut_matmul,
    packed_columns,
    packed_matmul,
    packed_matmul_grouped,
    prepack,
    zero_of_line,
)
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.lut_matmul.packed_weight import LAYOUTS, layout_of
from pallas_kernels.scales import QuantizedScales, expanded
from pallas_kernels.sparse_matmul import (
    KERNEL_LANES,
    BlockCodes,
    RowCodes,
    pack_rows,
    sparse_matmul,
)
from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL

GROUP = 128
LIMITS = {"bfloat16": 1.1e-2, "float16": 2e-3, "float32": 1e-5}
"""Relative Frobenius errors of sums of rounded weights, by dtype of the activations."""

_COLUMNS = 320
_THRESHOLD = 0.7


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
      status: ``"ok"``, ``"refused"`` by an implementation that does not take the product, or
        ``"FAILED"``.
      result: The relative Frobenius error (of an identity: 0 or 1), or why there is none.
    """

    status: Literal["ok", "refused", "FAILED"]
    result: float | str

    def describe(self, limit: float) -> str:
        """The result in words.

        >>> Outcome("FAILED", 0.5).describe(1e-5)
        'relative error 0.5, at most 1e-05 is right'
        """
        if isinstance(self.result, str):
            return self.result
        if not limit:
            return "other bits than the dense weight" if self.result else "the same bits"
        return f"relative error {self.result:.2g}, at most {limit:.2g} is right"


@dataclasses.dataclass(frozen=True)
class Check:
    """A small product with codes of ``bits`` for ``p`` rows.

    Attributes:
      bits: Bits a code.
      m: Rows of the activations.
      dtype: Of the activations.
      transpose: Multiplies by the transposed weight.
      identity: Multiplies the identity, and asks for the bits of the rounded dense weight.
      k: Rows of the weight.
      n: Its columns.
      group: Rows that share a scale.
      p: Rows that share a code.
      weights: Several are multiplied at once, each by a tile of ``m`` rows of its own, of which one
        is empty.
      spaced: Whether entries are equally spaced, which a kernel may compute once prepacked; with
        offsets the first entry is zero, else the middle one.
      offsets: Whether groups have offsets.
      quantized: Whether scales and offsets are quantised themselves, two groups a step.
      per_column: Whether every column has a table of its own.
      columns: Looks ``m`` columns of a prepacked weight up instead.
    """

    bits: int
    m: int
    dtype: str = "bfloat16"
    transpose: bool = False
    identity: bool = False
    k: int = 576
    n: int = _COLUMNS
    group: int = GROUP
    p: int = 1
    weights: int = 1
    spaced: bool = False
    offsets: bool = False
    quantized: bool = False
    per_column: bool = False
    columns: bool = False

    @property
    def limit(self) -> float:
        """The largest error that is right."""
        return 0.0 if self.identity else LIMITS[self.dtype]

    def __str__(self) -> str:
        kinds = [
            *(["transposed"] if self.transpose else []),
            *(["identity"] if self.identity else []),
            *(["pairs"] if self.p > 1 else []),
            *(["equally spaced"] if self.spaced else []),
            *(["offsets"] if self.offsets else []),
            *(["quantised scales"] if self.quantized else []),
            *(["a table a column"] if self.per_column else []),
            *([f"{self.k} x {self.n}"] if self.n != _COLUMNS else []),
            *([f"groups of {self.group}"] if self.group != GROUP else []),
            *([f"{self.weights} weights"] if self.weights > 1 else []),
        ]
        what = "columns" if self.columns else "rows of x"
        return ", ".join([f"{self.bits} bits", f"{self.m} {what}", self.dtype, *kinds])

    def run(self, implementation: str) -> Outcome:
        """Multiplies twice by the named implementation.

        >>> Check(4, 1, dtype="float32").run("reference").status
        'ok'
        """
        x, weight = self._x(), self._weight()
        reason = self._reason_against(implementation, x, weight)
        if reason is not None:
            return Outcome("refused", reason)
        if self.weights > 1:
            product, expected = self._several(implementation)
        elif self.columns:
            product, expected = self._columns(weight, implementation)
        else:
            product, expected = self._one(x, weight, implementation), self._expected(x, weight)
        return _outcome(product, expected, self.limit)

    def _reason_against(self, implementation: str, x: jax.Array, weight: tuple) -> str | None:
        """What is known to be no product of theirs; whatever else is raised is a failure."""
        static = {**self._static, "transpose": self.transpose}
        reason = LUT_MATMUL.reason_against_here(implementation, (x, *weight), static)
        if reason is not None or not (self.spaced or self.columns or self.weights > 1):
            return reason
        if self.weights > 1 and implementation not in LAYOUTS:
            return "it has no product with several weights"
        try:
            packed = jax.eval_shape(self._pack(implementation, zero_of_line(weight[2])), *weight)
        except NotImplementedError as error:
            return str(error)
        if not self.transpose or packed.layout is None:
            return None
        return layout_of(implementation).reason_against_transposed(packed)

    @property
    def _static(self) -> dict[str, Any]:
        k = self.m if self.identity else self.k
        return {"k": k, "group_size": min(self.group, k)}

    def _weight(self) -> tuple:
        key = jax.random.key(self.bits)
        words, scales, lut = self._random_weight(key)
        offsets = None
        if self.offsets:
            offsets = jax.random.uniform(key, scales.shape, jnp.float32, -0.5, 0.5)
            offsets = offsets.astype(scales.dtype)
        if self.spaced:
            half = 2 ** (self.bits - 1)
            first = 0 if self.offsets else -half
            lut = (jnp.arange(first, first + 2 * half, dtype=jnp.float32) / half)[None, :, None]
        if self.per_column:
            lut = jnp.stack([jnp.roll(lut[0], column, axis=0) for column in range(self.n)])
        if self.quantized:
            scales_key, offsets_key = jax.random.split(key)
            groups = scales.shape[0]
            double = _double_quantized(offsets_key, groups, self.n)
            return words, _quantized(scales_key, groups, self.n), lut, double
        return words, scales, lut, offsets

    def _random_weight(self, key: jax.Array) -> tuple:
        return random_weight(key, self._static["k"], self.n, self.bits, self.p, self.group)

    def _x(self) -> jax.Array:
        k = self._static["k"]
        if self.identity:
            return jnp.eye(k, dtype=self.dtype)
        shape = (self.m, self.n if self.transpose else k)
        return jax.random.normal(jax.random.key(self.m), shape, jnp.float32).astype(self.dtype)

    def _expected(self, x: jax.Array, weight: tuple) -> np.ndarray:
        dense = dequantize(*expanded(weight), **self._static)
        if self.identity:
            return np.asarray(dense.astype(self.dtype), np.float64)
        matrix = np.asarray(dense, np.float64)
        return np.asarray(x, np.float64) @ (matrix.T if self.transpose else matrix)

    def _one(self, x: jax.Array, weight: tuple, implementation: str) -> Callable[[], jax.Array]:
        if self.spaced:  # which a kernel knows of prepacked weights only
            pack_weight = self._pack(implementation, zero_of_line(weight[2]))
            return lambda: packed_matmul(x, pack_weight(*weight), transpose=self.transpose)
        options = {**self._static, "transpose": self.transpose, "implementation": implementation}
        return lambda: lut_matmul(x, *weight, **options)

    def _pack(self, implementation: str, zero: int | None = None) -> Callable:
        options: dict[str, Any] = {"implementation": implementation, "dtype": self.dtype}
        return functools.partial(prepack, **self._static, **options, zero=zero)

    def _columns(
        self, weight: tuple, implementation: str
    ) -> tuple[Callable[[], jax.Array], np.ndarray]:
        pack_weight = self._pack(implementation, zero_of_line(weight[2]))
        columns = jnp.arange(self.m) * 37 % self.n
        dense = dequantize(*weight, **self._static)[:, columns]
        return lambda: packed_columns(pack_weight(*weight), columns), np.asarray(dense, np.float64)

    def _several(self, implementation: str) -> tuple[Callable[[], jax.Array], np.ndarray]:
        keys = jax.random.split(jax.random.key(self.bits), self.weights)
        stack = jax.vmap(self._random_weight)(keys)
        places = jnp.arange(self.weights)
        sizes = jnp.where(places == 1, 0, self.m)
        x = jax.random.normal(jax.random.key(self.m), (self.weights, self.m, self.k))
        x = jnp.where((sizes > 0)[:, None, None], x, 0).astype(self.dtype)
        pack_stack = jax.vmap(self._pack(implementation))

        def product() -> jax.Array:
            return packed_matmul_grouped(x, pack_stack(*stack), places[::-1], sizes)

        dense = jax.vmap(functools.partial(dequantize, **self._static))(*stack)[::-1]
        return product, np.asarray(x, np.float64) @ np.asarray(dense, np.float64)


CHECKS = (  # the simplest first: a kernel that hangs takes the rest with it
    Check(4, 64, identity=True),
    Check(4, 16),
    Check(2, 1),
    Check(3, 16),
    Check(4, 5, "float16"),
    Check(3, 13),
    Check(4, 3, "float32"),
    Check(4, 16, transpose=True),
    Check(8, 130),
    Check(4, 600, "float16"),
    Check(3, 130, transpose=True),
    Check(2, 192, identity=True),
    Check(8, 16, p=2),
    Check(6, 130, "float16", p=2),
    Check(4, 64, identity=True, p=2),
    Check(4, 1, weights=5),
    Check(3, 16, "float16", weights=40),
    Check(4, 130, weights=3),
    Check(4, 16, spaced=True),
    Check(8, 1, spaced=True),
    Check(3, 130, "float16", spaced=True),
    Check(8, 5, "float32", transpose=True, spaced=True),
    Check(4, 9, columns=True),
    Check(3, 130, "float16", columns=True),
    Check(8, 3, columns=True, spaced=True),
    Check(4, 5, offsets=True),
    Check(3, 9, "float32", transpose=True, offsets=True),
    Check(4, 16, spaced=True, offsets=True),
    Check(3, 9, columns=True, offsets=True),
    Check(4, 3, "float32", quantized=True),
    Check(6, 9, transpose=True, quantized=True),
    Check(4, 3, per_column=True),
)

LONG_CHECKS = (
    *(Check(bits, m, k=16384, n=1280) for bits in (4, 3, 2, 8) for m in (1, 16, 64)),
    *(Check(4, m, k=16384, n=1280, group=group) for group in (16, 32, 64) for m in (16, 130)),
    *(Check(bits, 512, k=8192, n=1408) for bits in (4, 3)),
    Check(4, 16, k=1280, n=16384, transpose=True),
    Check(3, 512, k=1408, n=8192, transpose=True),
    *(Check(4, m, k=11008, n=1024, group=64) for m in (1, 130)),
    Check(4, 3, k=8192, n=1280, weights=5),
)
"""Long enough that the pipelines of accelerators use their memory again; CPUs have none."""


def checks_here() -> tuple[Check, ...]:
    """The checks that suit the default backend."""
    return CHECKS if jax.default_backend() == "cpu" else CHECKS + LONG_CHECKS


@dataclasses.dataclass(frozen=True)
class SparseCheck:
    """A small product that ignores activations below a threshold.

    Attributes:
      m: Rows of the activations.
      bits: Bits a code; 0 for a dense weight in the dtype of the activations.
      dtype: Of the activations.
    """

    m: int
    bits: int = 0
    dtype: str = "bfloat16"

    @property
    def limit(self) -> float:
        """The largest error that is right."""
        return LIMITS[self.dtype]

    def __str__(self) -> str:
        weight = f"{self.bits} bits" if self.bits else "dense weight"
        return f"{weight}, {self.m} rows of x, {self.dtype}"

    def run(self, implementation: str | None) -> Outcome:
        """Multiplies twice by the named implementation; None: the one that the platform takes.

        >>> SparseCheck(1, bits=4, dtype="float32").run("masked").status
        'ok'
        """
        k = 384
        keys = jax.random.split(jax.random.key(self.bits), 3)
        x = jax.random.normal(keys[0], (self.m, k), jnp.float32).astype(self.dtype)
        if self.bits:
            codes = jax.random.randint(keys[1], (k, _COLUMNS), 0, 2**self.bits).astype(jnp.uint8)
            _, scales, lut = random_weight(keys[2], k, _COLUMNS, self.bits)
            words = pack(codes, self.bits)
            weight: Any = _weight_for_rows(codes, words, scales, lut)
            dense = dequantize(words, scales, lut, k=k, group_size=GROUP)
        else:
            dense = jax.random.normal(keys[1], (k, _COLUMNS), jnp.float32).astype(self.dtype)
            weight = dense
        if implementation is not None:
            arrays = (x, weight, jnp.float32([_THRESHOLD]))
            reason = SPARSE_MATMUL.reason_against_here(implementation, arrays, {})
            if reason is not None:
                return Outcome("refused", reason)
        live = np.where(np.abs(np.asarray(x, np.float64)) > np.float32(_THRESHOLD), x, 0)
        expected = live.astype(np.float64) @ np.asarray(dense, np.float64)
        product = functools.partial(
            sparse_matmul, x, weight, _THRESHOLD, implementation=implementation
        )
        return _outcome(product, expected, self.limit)


SPARSE_CHECKS = (
    SparseCheck(1),
    SparseCheck(1, dtype="float32"),
    SparseCheck(3, dtype="float16"),
    SparseCheck(1, bits=4),
    SparseCheck(3, bits=4, dtype="float32"),
    SparseCheck(1, bits=3, dtype="float16"),
    SparseCheck(3, bits=2),
)


def random_weight(
    key: jax.Array, k: int, n: int, bits: int, p: int = 1, group: int = GROUP
) -> tuple:
    """Random words, scales and a table; a code of ``bits`` for ``p`` rows."""
    words_key, scale_key, table_key = jax.random.split(key, 3)
    words = jax.random.bits(words_key, packed_shape((k // p, n), bits), jnp.uint8)
    scales = jax.random.uniform(scale_key, (-(-k // group), n), jnp.float32, 0.5, 1.5)
    lut = jax.random.normal(table_key, (1, 2**bits, p)).astype(jnp.bfloat16).astype(jnp.float32)
    return words, scales.astype(jnp.bfloat16), lut


def _quantized(key: jax.Array, groups: int, n: int) -> QuantizedScales:
    """As the K types of GGUF have them."""
    words_key, steps_key = jax.random.split(key)
    words = jax.random.bits(words_key, packed_shape((groups, n), bits=6), jnp.uint8)
    steps = jax.random.uniform(steps_key, (-(-groups // 2), n), jnp.float32, 0.01, 0.03)
    half = steps.astype(jnp.float16)
    return QuantizedScales(words, half, None, padding=-groups % BLOCK, block=(2, 1), zero=7)


def _double_quantized(key: jax.Array, groups: int, n: int) -> QuantizedScales:
    """As double quantisation has them."""
    words_key, steps_key = jax.random.split(key)
    words = jax.random.bits(words_key, packed_shape((groups, n), bits=8), jnp.uint8)
    steps = jax.random.uniform(steps_key, (groups, -(-n // 24)), jnp.float32, 1e-3, 3e-3)
    floor = jnp.full((1, 1), -0.25)
    return QuantizedScales(words, steps, floor, padding=-groups % BLOCK, block=(1, 24))


def _weight_for_rows(
    codes: jax.Array, words: jax.Array, scales: jax.Array, lut: jax.Array
) -> BlockCodes | RowCodes:
    """The layout whose rows this platform skips."""
    k, bits = codes.shape[0], words.shape[1]
    lanes = KERNEL_LANES.get(jax.default_backend())
    if lanes is None:
        return BlockCodes(words, scales, lut, None, k, GROUP)
    return RowCodes(pack_rows(codes, bits, lanes), scales, lut, None, GROUP)


def _outcome(product: Callable[[], jax.Array], expected: np.ndarray, limit: float) -> Outcome:
    try:
        y, again = np.asarray(product()), np.asarray(product())
    except Exception as error:  # whatever a compiler or a device raises is the result
        return Outcome("FAILED", f"{type(error).__name__}: {str(error)[:300]}")
    if not np.array_equal(y, again):
        return Outcome("FAILED", "two runs differ")
    if not limit:
        distance = float(not np.array_equal(y.astype(np.float64), expected))
    else:
        difference = np.linalg.norm(y.astype(np.float64) - expected)
        distance = float(difference / np.linalg.norm(expected))
    return Outcome("ok" if distance <= limit else "FAILED", distance)
