"""Value tables ("codebooks"): the numbers that codes stand for, in units of a group's scale.

A table is a ``float32[2**bits]`` vector, or of pairs ``float32[2**bits, 2]``. What it contains
decides how groups are scaled:

* a table with negative values spans [-1, 1] and is scaled by the group's absolute maximum;
* a table without spans [0, 1] and is *affine*: scaled by ``max - min`` and offset by ``min``;
* the tables of :func:`gaussian` are in units of the group's root mean square.

A new kind of table is one function ``bits -> values`` and one line in :data:`CODEBOOKS`.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.special import ndtri

from lutjax.packing import MAX_BITS


def normal_float(bits: int) -> np.ndarray:
    """NormalFloat: quantiles of the normal distribution with an exact zero.

    With h = 2**(b-1), ``q = linspace(delta, 1/2, h)`` followed by
    ``linspace(1/2, 1 - delta, h + 1)[1:]``, and ``v = Phi^-1(q) / max Phi^-1(q)``, where the tail
    that is cut off shrinks with the number of values,
    ``delta = (1 / 2**(b+1) + 1 / (2**(b+1) - 2)) / 2``. At 4 bits this is the published NF4 table;
    at 3 bits it has a lower error than :func:`normal_float_flute` (0.197 against 0.201 relative to
    the norm of a Gaussian weight, groups of 64).

    Args:
      bits: 2 to 8.

    Returns:
      ``float32[2**bits]`` in ascending order.

    Source: QLoRA (arXiv 2305.14314, section 3 and appendix E).

    >>> normal_float(2).round(4).tolist()
    [-1.0, 0.0, 0.43..., 1.0]
    """
    count = 2 ** (bits + 1)
    return _normal_quantiles(bits, delta=0.5 * (1 / count + 1 / (count - 2)))


def normal_float_flute(bits: int) -> np.ndarray:
    """NormalFloat with the 4-bit tail ``delta = (1/32 + 1/30) / 2`` at every bit width.

    The tables that the published code of FLUTE (arXiv 2407.10960) and LQ-LoRA (arXiv 2311.12023)
    uses; needed to repeat their figures.

    >>> normal_float_flute(2).round(4).tolist()
    [-1.0, 0.0, 0.33..., 1.0]
    """
    return _normal_quantiles(bits, delta=0.5 * (1 / 32 + 1 / 30))


def symmetric_int(bits: int) -> np.ndarray:
    """Evenly spaced integers ``(-2**(b-1), ..., 2**(b-1) - 1) / (2**(b-1) - 1)``.

    The lowest value lies below -1, so an absolute-maximum scale never selects it: the usual
    symmetric quantiser with an unused code.

    >>> (symmetric_int(3) * 3).tolist()
    [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    _check_bits("int", bits, 2)
    half = 2 ** (bits - 1)
    return (np.arange(-half, half) / (half - 1)).astype(np.float32)


def affine_int(bits: int) -> np.ndarray:
    """Evenly spaced values ``(0, ..., 2**b - 1) / (2**b - 1)`` for min-max scaling.

    >>> affine_int(1).tolist()
    [0.0, 1.0]
    """
    _check_bits("affine", bits, 1)
    return (np.arange(2**bits) / (2**bits - 1)).astype(np.float32)


def float_e2m1(bits: int) -> np.ndarray:
    """FP4 with two exponent bits and one mantissa bit, divided by its largest value 6.

    Code order is the bit pattern: sign, exponent, mantissa; so code 8 is a second zero.

    Source: ZeroQuant-FP (arXiv 2307.09782).

    >>> (float_e2m1(4)[:8] * 6).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if bits != 4:
        raise ValueError(f"codebook 'fp4' has 4 bits, not {bits}; use bits=4 or another codebook")
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32) / np.float32(6)
    return np.concatenate([magnitude, -magnitude])


def gaussian(bits: int, vector_size: int = 1) -> np.ndarray:
    """The points with the least mean squared distance to normal numbers, or to pairs of them.

    Relative error a weight with single values of 2, 3 and 4 bits: 0.1175, 0.03455 and 0.00950; with
    pairs of twice as many bits: 0.1076, 0.0296 and 0.0078. Meant for rotated weights, whose entries
    are nearly normal, in units of their root mean square.

    Args:
      bits: Bits of a code, 1 to 8, for pairs 2 to 8.
      vector_size: 1, or 2 for pairs.

    Returns:
      ``float32[2**bits, vector_size]`` in lexicographic order.

    Raises:
      ValueError: For other bits or vector sizes.

    Source: HIGGS (arXiv 2411.17525, section 4); computed by ``benchmarks/gaussian_grids.py``.

    >>> [round(float(value), 3) for value in gaussian(1)[:, 0]]
    [-0.798, 0.798]
    >>> gaussian(8, vector_size=2).shape
    (256, 2)
    """
    return np.array(_gaussian_grid(bits, vector_size)["points"], np.float32)


def gaussian_error(bits: int, vector_size: int = 1) -> float:
    """The mean squared error of :func:`gaussian` for normal numbers of variance 1.

    >>> gaussian_error(4)
    0.009501008
    """
    return _gaussian_grid(bits, vector_size)["error"]


def _gaussian_grid(bits: int, vector_size: int) -> dict:
    if vector_size not in (1, 2):
        raise ValueError(f"codebook 'gaussian' exists for vector_size 1 and 2, not {vector_size}")
    _check_bits(GAUSSIAN, bits, vector_size)
    return _gaussian_grids()[f"{bits} bits, {vector_size} dimensions"]


@functools.cache
def _gaussian_grids() -> dict:
    file = importlib.resources.files("lutjax") / "gaussian_grids.json"
    return json.loads(file.read_text(encoding="utf-8"))


CODEBOOKS: dict[str, Callable[[int], np.ndarray]] = {
    "nf": normal_float,
    "nf_flute": normal_float_flute,
    "int": symmetric_int,
    "affine": affine_int,
    "fp4": float_e2m1,
}
"""Tables of single values that span [-1, 1] or [0, 1], by name.

Besides these there are ``"kmeans"``, which needs the weights themselves (:func:`kmeans`), and
``"gaussian"`` (:func:`gaussian`).
"""

LEARNED = "kmeans"
GAUSSIAN = "gaussian"


def codebook(name: str, bits: int) -> np.ndarray:
    """The table called ``name`` for ``bits`` bits.

    Raises:
      ValueError: For an unknown name, or bits that the table does not exist for.

    >>> codebook("int", 2).tolist()
    [-2.0, -1.0, 0.0, 1.0]
    """
    if name == GAUSSIAN:
        return gaussian(bits)[:, 0]
    if name not in CODEBOOKS:
        known = ", ".join(sorted([*CODEBOOKS, LEARNED, GAUSSIAN]))
        raise ValueError(f"unknown codebook {name!r}; use one of {known}, or give the values")
    return CODEBOOKS[name](bits)


def user_table(values: np.ndarray) -> np.ndarray:
    """Checks a table given by hand and scales it so that its largest magnitude is 1.

    Args:
      values: ``[2**bits]`` finite numbers for some bits in 1..8, in any order.

    Returns:
      ``float32[2**bits]``.

    Raises:
      ValueError: If the number of values is no power of two up to 256, or they are not finite.

    >>> user_table([-4, 0, 1, 2]).tolist()
    [-1.0, 0.0, 0.25, 0.5]
    """
    table = np.asarray(values, np.float32)
    if table.ndim != 1 or table.size not in [2**b for b in range(1, MAX_BITS + 1)]:
        raise ValueError(
            f"a codebook needs 2, 4, 8, ... or 256 values in one row, got shape {table.shape}"
        )
    if not np.isfinite(table).all() or not table.any():
        raise ValueError(f"a codebook needs finite values that are not all zero, got {values}")
    return table / np.abs(table).max()


def is_affine(table: np.ndarray) -> bool:
    """Whether groups take an offset: true for a table without negative values.

    >>> is_affine(affine_int(4)), is_affine(normal_float(4))
    (True, False)
    """
    return bool(np.min(table) >= 0)


def kmeans(
    values: Float[Array, "k n"],
    bits: int,
    *,
    weights: Float[Array, "k n"] | None = None,
    per_channel: bool = False,
    iterations: int = 200,
) -> Float[Array, "t c"]:
    """Fits a table to data: Lloyd's algorithm in one dimension, the best of three starts.

    The starts are NormalFloat, the middles of equal shares of the weight, and even spacing.

    Minimises ``sum_i weights_i * (values_i - nearest_table_value)**2``. Clusters stay in ascending
    order; an empty cluster keeps its value.

    Args:
      values: Weights in units of their group's scale, so within [-1, 1].
      bits: 2 to 8.
      weights: Sensitivities, not negative; all ones by default.
      per_channel: One table for each column (SqueezeLLM) instead of one for the matrix.
      iterations: Rounds of Lloyd's algorithm.

    Returns:
      ``float32[N, 2**bits]`` if per channel, else ``float32[1, 2**bits]``.

    Source: SqueezeLLM (arXiv 2306.07629, section 4.1).

    >>> import jax.numpy as jnp
    >>> kmeans(jnp.array([[-1.0], [0.0], [0.5], [1.0]]), bits=2).tolist()
    [[-1.0, 0.0, 0.5, 1.0]]
    """
    values = values.astype(jnp.float32)
    weights = jnp.ones_like(values) if weights is None else weights.astype(jnp.float32)
    if not per_channel:
        values, weights = values.reshape(-1, 1), weights.reshape(-1, 1)
    count = 2**bits

    def fit(column, weight):
        # Sorted once, every cluster is a range, and its sums are differences of running sums.
        order = jnp.argsort(column)
        column, weight = column[order], weight[order]
        mass, total = (jnp.pad(jnp.cumsum(a), (1, 0)) for a in (weight, weight * column))

        def clusters(table):
            boundaries = (table[1:] + table[:-1]) / 2
            inner = jnp.searchsorted(column, boundaries, side="right")
            edges = jnp.pad(inner, (1, 1), constant_values=(0, column.size))
            return jnp.diff(mass[edges]), jnp.diff(total[edges])

        def round_(_, table):
            in_cluster, sums = clusters(table)
            return jnp.where(in_cluster > 0, sums / jnp.maximum(in_cluster, 1e-30), table)

        def explained(table):  # the error is a constant minus this
            in_cluster, sums = clusters(table)
            return jnp.sum(jnp.where(in_cluster > 0, sums**2 / jnp.maximum(in_cluster, 1e-30), 0))

        shares = jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32) * mass[-1]
        equal_shares = column[jnp.clip(jnp.searchsorted(mass[1:], shares), 0, column.size - 1)]
        even = jnp.linspace(column[0], column[-1], count)
        starts = jnp.stack([jnp.asarray(normal_float(bits)), equal_shares, even])
        tables = jax.vmap(lambda start: jax.lax.fori_loop(0, iterations, round_, start))(starts)
        return tables[jnp.argmax(jax.vmap(explained)(tables))]

    return jax.vmap(fit, in_axes=1)(values, weights)


def nearest_codes(
    values: Float[Array, "... k n"], table: np.ndarray | Float[Array, "... t c"]
) -> UInt8[Array, "... k n"]:
    """Index of the table value nearest to each entry; halfway goes to the lower value.

    Args:
      values: ``float32[..., K, N]``.
      table: A fixed table ``float32[C]`` in any order, or learned tables ``[..., T, C]`` with T = 1
        or N, whose values ascend.

    Returns:
      ``uint8[..., K, N]``.

    >>> import jax.numpy as jnp
    >>> nearest_codes(jnp.array([[-1.0], [0.1], [0.5]]), np.float32([2, 1, 0, -1])).tolist()
    [[3], [2], [2]]
    """
    order = np.argsort(table, kind="stable") if isinstance(table, np.ndarray) else None
    ascending = jnp.asarray(table if order is None else np.asarray(table)[order][None])
    boundaries = (ascending[..., 1:] + ascending[..., :-1]) / 2  # [..., T, C - 1]
    boundaries = boundaries.reshape((1,) * (values.ndim - boundaries.ndim) + boundaries.shape)
    rank = _count_below(values, jnp.swapaxes(boundaries, -1, -2))
    if order is None or (order == np.arange(order.size)).all():
        return rank
    return jnp.asarray(order, jnp.uint8)[rank.astype(jnp.int32)]


def dithered_codes(
    values: Float[Array, "... k n"],
    table: Float[np.ndarray, " c"],
    thresholds: Float[Array, "... k n"],
) -> UInt8[Array, "... k n"]:
    """Index of the table value below each entry, or above where its share of the gap is larger.

    With evenly distributed thresholds, decoded entries are right on average (stochastic rounding).

    Args:
      values: ``float32[..., K, N]``; those outside the table get its first or last code.
      table: ``float32[C]``, ascending.
      thresholds: ``float32[..., K, N]``, between 0 and 1.

    Returns:
      ``uint8[..., K, N]``.

    >>> table, values = np.float32([0, 1, 3]), jnp.full((3, 1), 2.5)
    >>> dithered_codes(values, table, jnp.array([[0.2], [0.7], [0.8]])).tolist()
    [[2], [2], [1]]
    """
    boundaries = jnp.asarray(table)[1:].reshape((1,) * (values.ndim - 2) + (-1, 1))
    below = jnp.minimum(_count_below(values, boundaries).astype(jnp.int32), table.size - 2)
    start, gap = (jnp.asarray(x)[below] for x in (table[:-1], np.diff(table)))
    return jnp.where(values - start > thresholds * gap, below + 1, below).astype(jnp.uint8)


def nearest_vectors(
    values: Float[Array, "... k n"], table: Float[np.ndarray, "c p"]
) -> UInt8[Array, "... j n"]:
    """Index of the table vector nearest to each p consecutive entries along K.

    Args:
      values: ``float32[..., K, N]``; K is padded with zeros to a multiple of p.
      table: ``float32[C, p]``.

    Returns:
      ``uint8[..., ceil(K / p), N]``; of several nearest ones the first, up to rounding.

    >>> table = np.float32([[0, 0], [1, 1], [1, -1]])
    >>> nearest_vectors(jnp.array([[0.9], [0.8], [0.7], [-2.0]]), table).tolist()
    [[1], [2]]
    """
    p = table.shape[1]
    *batch, k, n = values.shape
    values = jnp.pad(values, [*[(0, 0)] * len(batch), (0, -k % p), (0, 0)])
    vectors = jnp.swapaxes(values.reshape(*batch, -1, p, n), -1, -2)
    half_norms = np.square(table).sum(axis=1) / np.float32(2)

    def nearest(vector: jax.Array) -> jax.Array:
        closeness = jnp.matmul(table, vector, precision=jax.lax.Precision.HIGHEST) - half_norms
        return jnp.argmax(closeness).astype(jnp.uint8)

    # as many distances at a time as weigh 64 MiB
    codes = jax.lax.map(nearest, vectors.reshape(-1, p), batch_size=2**24 // len(table))
    return codes.reshape(vectors.shape[:-1])


def _count_below(values: jax.Array, boundaries: jax.Array) -> jax.Array:
    """How many boundaries ``[..., C - 1, T]`` lie strictly below each of ``values [..., K, N]``."""
    count = boundaries.shape[-2]
    if count < 32:  # comparisons fuse into one pass over the values
        rank = jnp.zeros(values.shape, jnp.uint8)
        for i in range(count):
            rank += (values > boundaries[..., i : i + 1, :]).astype(jnp.uint8)
        return rank
    # Branch-free binary search: one pass over the values per bit.
    half = (count + 1) // 2
    rank = jnp.where(values > boundaries[..., half - 1 : half, :], jnp.int32(half), jnp.int32(0))
    shared = boundaries.size == count  # then no indices of columns are needed
    full = jnp.broadcast_to(boundaries, (*values.shape[:-2], count, values.shape[-1]))
    step = half // 2
    while step:
        place = rank + (step - 1)
        if shared:
            probe = boundaries.reshape(-1).at[place].get(mode="promise_in_bounds")
        else:
            probe = jnp.take_along_axis(full, place, axis=-2, mode="promise_in_bounds")
        rank = jnp.where(values > probe, rank + step, rank)
        step //= 2
    return rank.astype(jnp.uint8)


def _normal_quantiles(bits: int, delta: float) -> np.ndarray:
    _check_bits("nf", bits, 2)
    half = 2 ** (bits - 1)
    q = np.concatenate([np.linspace(delta, 0.5, half), np.linspace(0.5, 1 - delta, half + 1)[1:]])
    quantiles = ndtri(q)
    quantiles[half - 1] = 0.0
    return (quantiles / quantiles.max()).astype(np.float32)


def _check_bits(name: str, bits: int, least: int) -> None:
    if not least <= bits <= MAX_BITS:
        raise ValueError(f"codebook {name!r} exists for {least} to {MAX_BITS} bits, not {bits}")
