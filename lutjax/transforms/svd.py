"""Truncated singular value decompositions."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

SvdMethod = Literal["randomized", "dense"]

OVERSAMPLE = 10
POWER_ITERATIONS = 2


def range_basis(
    key: PRNGKeyArray, a: Float[Array, "*batch k n"], columns: int, power_iterations: int
) -> Float[Array, "*batch k c"]:
    r"""Orthonormal columns that nearly span the leading left singular vectors.

    They span the range of ``(A A^T)^q A`` times Gaussian columns.

    Args:
      key: Draws the Gaussian columns.
      a: ``float[*batch, K, N]``.
      columns: How many, at most min(K, N).
      power_iterations: The exponent q; each one sharpens the spectrum.

    Source: Halko, Martinsson, Tropp (arXiv 0909.4061, algorithm 4.4).

    >>> basis = range_basis(jax.random.key(0), jnp.outer(jnp.arange(4.0), jnp.ones(3)), 1, 0)
    >>> bool(jnp.allclose(jnp.abs(basis[:, 0]), jnp.arange(4.0) / 14**0.5, atol=1e-5))
    True
    """
    transposed = jnp.matrix_transpose(a)
    start = jax.random.normal(key, (*a.shape[:-2], a.shape[-1], columns), a.dtype)
    basis = _orthonormal(a @ start)
    for _ in range(power_iterations):
        basis = _orthonormal(a @ _orthonormal(transposed @ basis))
    return basis


def randomized_svd(
    key: PRNGKeyArray, a: Float[Array, "k n"], rank: int
) -> tuple[Float[Array, "k r"], Float[Array, " r"], Float[Array, "r n"]]:
    r"""The leading singular triplets, from a random projection.

    Takes the exact decomposition of A within a :func:`range_basis` of ``OVERSAMPLE`` columns more
    than the rank.

    Args:
      key: Draws the projection; the same key gives the same bits.
      a: ``float[K, N]``.
      rank: Number of triplets r, 1 to min(K, N).

    Returns:
      ``u [K, r]``, ``s [r]`` in descending order and ``vt [r, N]``.

    Source: Halko, Martinsson, Tropp (arXiv 0909.4061, algorithm 5.1).

    >>> a = jnp.outer(jnp.arange(4.0), jnp.ones(3))
    >>> u, s, vt = randomized_svd(jax.random.key(0), a, 1)
    >>> bool(jnp.allclose(u * s @ vt, a, atol=1e-5))
    True
    """
    basis = range_basis(key, a, min(rank + OVERSAMPLE, *a.shape), POWER_ITERATIONS)
    # Reducing to a small square first: LAPACK's SVD of a long matrix costs many times as much.
    other, small = jnp.linalg.qr(a.T @ basis, mode="reduced")
    u, s, vt = jnp.linalg.svd(small.T, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank] @ other.T


def truncated_svd(
    key: PRNGKeyArray, a: Float[Array, "k n"], rank: int, method: SvdMethod = "randomized"
) -> tuple[Float[Array, "k r"], Float[Array, " r"], Float[Array, "r n"]]:
    """The leading singular triplets by the named method; ``"dense"`` ignores the key.

    >>> _, s, _ = truncated_svd(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0])), 1, "dense")
    >>> s.tolist()
    [3.0]
    """
    if method == "randomized":
        return randomized_svd(key, a, rank)
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def low_rank_factors(
    key: PRNGKeyArray, a: Float[Array, "k n"], rank: int, method: SvdMethod = "randomized"
) -> tuple[Float[Array, "k r"], Float[Array, "r n"]]:
    """The best rank-r product ``left @ right`` of A, with the root of S on both sides.

    >>> left, right = low_rank_factors(jax.random.key(0), 4 * jnp.eye(2), 2, "dense")
    >>> (left @ right).tolist()
    [[4.0, 0.0], [0.0, 4.0]]
    """
    u, s, vt = truncated_svd(key, a, rank, method)
    root = jnp.sqrt(s)
    return u * root[None, :], root[:, None] * vt


def balanced(
    left: Float[Array, "k r"], right: Float[Array, "r n"]
) -> tuple[Float[Array, "k r"], Float[Array, "r n"]]:
    """The factors of the same product that have the roots of its singular values on both sides.

    >>> left, right = balanced(4 * jnp.eye(2), jnp.eye(2))
    >>> jnp.abs(left).tolist(), (left @ right).round(5).tolist()
    ([[2.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 4.0]])
    """
    u, first = jnp.linalg.qr(left, mode="reduced")
    v, second = jnp.linalg.qr(right.T, mode="reduced")
    core = jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)
    a, s, b = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(s)
    return u @ (a * root[None, :]), (root[:, None] * b) @ v.T


def _orthonormal(a: Float[Array, "*batch m c"]) -> Float[Array, "*batch m c"]:
    return jnp.linalg.qr(a, mode="reduced")[0]
