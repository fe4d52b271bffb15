"""Rounding with error feedback (GPTQ): rows that come later make up for the errors of earlier ones.

The error of a product is ``|X (W - Q)|**2``, the sum over columns of ``e.T H e`` with
``H = X.T X``. Rows are rounded one after the other (or p at a time, where p rows share a code),
those that meet the largest inputs first. As the later rows are still free, the best that they can
do about an error ``e`` of row i is known: with ``inv(H) = U.T U``, U upper triangular in the order
of rounding, row j changes by ``-U[i, j] inv(U[i, i].T) e``.

Source: GPTQ (arXiv 2210.17323, section 3), with scales fixed beforehand so that rows may be taken
in any order; rows that share a code are taken together, with matrices instead of numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, UInt8

from lutjax import codebooks

DAMPING = 0.01
"""Added to the diagonal of H, as a part of its mean: what was not seen is small, not zero."""

# Rows whose changes of all later rows are one product.
_BLOCK = 128


def round_with_feedback(
    matrix: Float[Array, "k n"],
    hessian: Float[Array, "k k"],
    scales: Float[Array, "k n"],
    offsets: Float[Array, "k n"] | None,
    lut: Float[Array, "1 c p"],
) -> UInt8[Array, "j n"]:
    """Codes of one matrix that make the error of ``X @ W`` small.

    Args:
      matrix: ``float32[K, N]``.
      hessian: ``float32[K, K]``, ``X.T @ X`` of the inputs, up to a factor.
      scales: The scale of every entry; where it is zero, the offset or zero is what is read back.
      offsets: What is added to it, or None.
      lut: The table, in any order; p rows share a code, 1 or 2 of one scale.

    Returns:
      ``uint8[ceil(K / p), N]``.

    >>> w, x = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 1.0], [1.0, 0.9]])
    >>> table = jnp.array([0.0, 1.0]).reshape(1, 2, 1)
    >>> codes = round_with_feedback(w, x.T @ x, jnp.ones_like(w), None, table)
    >>> codes.tolist()  # 0.4 + 0.4 is nearer to 1 + 0 than to 0 + 0
    [[0], [1]]
    """
    k, n = matrix.shape
    p = lut.shape[-1]
    padding = [(0, -k % _BLOCK), (0, 0)]
    matrix = jnp.pad(matrix if offsets is None else matrix - offsets, padding)
    scales = jnp.pad(scales, padding, constant_values=1)
    rows = matrix.shape[0]
    hessian = damped(hessian)
    # Rows that only fill a block or a pair have no errors of their own.
    padded = jnp.where(jnp.arange(rows) < k, 0, DAMPING**2 * jnp.diagonal(hessian).mean())
    hessian = jnp.pad(hessian, (padding[0], padding[0])) + jnp.diag(padded)
    inputs = jnp.diagonal(hessian).reshape(-1, p).sum(axis=1)
    order = jnp.argsort(-inputs)[:, None] * p + jnp.arange(p)[None]
    order = order.reshape(-1)
    matrix, scales = matrix[order], scales[order]
    upper = _inverse_factor(hessian[order][:, order])
    choose = _choice(lut[0])

    def block(matrix: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jax.lax.dynamic_slice_in_dim(matrix, start, _BLOCK)
        own_scales = jax.lax.dynamic_slice_in_dim(scales, start, _BLOCK)
        change = jax.lax.dynamic_slice_in_dim(upper, start, _BLOCK)  # [_BLOCK, rows]
        within = jax.lax.dynamic_slice_in_dim(change, start, _BLOCK, axis=1)

        def step(own: jax.Array, row: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            values, scale, fed = (
                jax.lax.dynamic_slice_in_dim(a, row, p) for a in (own, own_scales, within)
            )
            corner = jax.lax.dynamic_slice_in_dim(fed, row, p, axis=1)
            # inv(corner.T)
            metric = solve_triangular(corner, jnp.eye(p, dtype=corner.dtype), trans=1)
            codes, rounded = choose(values / jnp.where(scale == 0, 1, scale), metric)
            error = metric @ (values - rounded * scale)
            return own - _product(fed.T, error), (codes, error)

        starts = jnp.arange(0, _BLOCK, p)
        _, (codes, errors) = jax.lax.scan(step, own, starts)
        return matrix - _product(change.T, errors.reshape(_BLOCK, n)), codes

    _, codes = jax.lax.scan(block, matrix, jnp.arange(0, rows, _BLOCK))
    codes = codes.reshape(-1, n)
    return jnp.zeros_like(codes).at[order[::p] // p].set(codes)[: -(-k // p)]


def _choice(
    table: Float[Array, "c p"],
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """From p rows in units of their scales, and a metric, to their codes ``[N]`` and values."""

    def nearest(units: jax.Array, metric: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = order[codebooks.nearest_codes(units, ascending)[0]]
        return codes, table[codes].T

    def nearest_vector(units: jax.Array, metric: jax.Array) -> tuple[jax.Array, jax.Array]:
        # What counts is the error after the other rows have made up for it.
        points, vectors = _product(table, metric.T), _product(metric, units)
        closeness = _product(points, vectors) - jnp.square(points).sum(axis=1)[:, None] / 2
        codes = jnp.argmax(closeness, axis=0).astype(jnp.uint8)
        return codes, table[codes].T

    if table.shape[1] > 1:
        return nearest_vector
    order = jnp.argsort(table[:, 0]).astype(jnp.uint8)
    ascending = table[order].T
    return nearest


def _inverse_factor(hessian: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The upper triangular U with ``inv(H) = U.T U``.

    Reversed in both axes, H is ``L L.T``; L reversed is the inverse of U. So H is never inverted.
    """
    inverse = factor(hessian[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(inverse, jnp.eye(hessian.shape[0], dtype=hessian.dtype))


def damped(hessian: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """A Hessian with :data:`DAMPING` of its mean diagonal added, so that it has an inverse.

    >>> damped(jnp.diag(jnp.array([200.0, 0.0]))).tolist()
    [[201.0, 0.0], [0.0, 1.0]]
    """
    k = hessian.shape[0]
    mean = jnp.diagonal(hessian).mean()
    return hessian + DAMPING * jnp.where(mean > 0, mean, 1) * jnp.eye(k, dtype=hessian.dtype)


def factor(hessian: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The lower triangular L with ``H = L L.T`` of a damped Hessian.

    Where rounding errors of H exceed the damping, there is ten times more of it.

    >>> factor(jnp.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
    [[2.0, 0.0], [1.0, 1.0]]
    """
    identity = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    # Above zero, or the search would not end.
    least = DAMPING * jnp.abs(jnp.diagonal(hessian)).mean() + jnp.finfo(hessian.dtype).tiny

    def cholesky(damping: jax.Array) -> jax.Array:
        return jnp.linalg.cholesky(hessian + damping * identity)

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.isnan(state[1]).any() & jnp.isfinite(state[0])

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        damping = jnp.where(state[0] > 0, 10 * state[0], least)
        return damping, cholesky(damping)

    none = jnp.float32(0)
    return jax.lax.while_loop(failed, more, (none, cholesky(none)))[1]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
