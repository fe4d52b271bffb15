"""``sparse_matmul``: the product that ignores activations below a threshold."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.manual_axes import vary_over, varying_axes
from pallas_kernels.sparse_matmul import masked
from pallas_kernels.sparse_matmul.blocks import BlockCodes
from pallas_kernels.sparse_matmul.checks import check_arguments, matrix_shape
from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL
from pallas_kernels.sparse_matmul.rows import RowCodes

IMPLEMENTATIONS = SPARSE_MATMUL.implementations


def sparse_matmul(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "K N"] | BlockCodes | RowCodes,
    thresholds: Any,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    r"""Multiplies the activations above a threshold by a dense or lookup-table weight.

    .. math:: y_n = \sum_k x_k \, [|x_k| > t_k] \, W_{kn}

    For few rows of ``x`` the rows of W that meet only ignored activations are not read; with
    several rows of ``x``, a row of W is read if any of them needs it. Sums are taken in float32, in
    an order that does not change between runs.

    The gradients are those of the masked dense product; thresholds have none. Leading axes of the
    weight are mapped with :func:`jax.vmap`.

    Args:
      x: ``[..., K]``.
      weight: ``[K, N]``, or ``[K, N / 128, 128]``, the form of a dense weight in which a TPU can
        read single rows; or lookup-table codes: :class:`BlockCodes` in the canonical layout, whose
        rows a CPU skips, or :class:`RowCodes`, whose rows a GPU or TPU skips.
      thresholds: A number, ``[1]``, or ``[K]`` for one of each row of W.
      implementation: One of ``IMPLEMENTATIONS``; None picks, while it is traced, the best one that
        supports the arguments on the platform that programs are compiled for here. To lower for an
        absent device, trace under a ``jax.sharding.AbstractMesh`` with its ``AbstractDevice``.

    Returns:
      ``[..., N]`` in the dtype of ``x``.

    Raises:
      ValueError: If shapes do not fit each other or the implementation is unknown.
      TypeError: If a dtype is wrong.
      NotImplementedError: If the named implementation cannot run these arguments here.

    Source: TEAL (arXiv 2408.14690).

    >>> x = jnp.array([[0.1, -3.0]])
    >>> sparse_matmul(x, jnp.array([[1.0, 2.0], [10.0, 20.0]]), 0.5).tolist()
    [[-30.0, -60.0]]
    """
    SPARSE_MATMUL.check_name(implementation)
    thresholds = jnp.asarray(thresholds, jnp.float32)
    check_arguments(x, weight, thresholds)
    k, n = matrix_shape(weight)
    if n == 0:
        return jnp.zeros((*x.shape[:-1], 0), x.dtype)
    arrays = (x.reshape(-1, k), weight, jnp.atleast_1d(thresholds))
    SPARSE_MATMUL.check_runs_here(implementation, arrays, {})
    axes = varying_axes(*jax.tree.leaves(arrays))
    operands = jax.tree.map(lambda a: vary_over(a, axes), arrays)
    return _product(implementation, *operands).reshape(*x.shape[:-1], n)


def _batched_run(implementation: str | None, x: Any, weight: Any, thresholds: Any) -> Any:
    """The product with a batching rule: a batch of activations only is more rows of ``x``.

    A batch of weights is a loop, so that each of its products skips its own rows.
    """

    @jax.custom_batching.custom_vmap
    def product(x, weight, thresholds):
        return _run(implementation, x, weight, thresholds)

    @product.def_vmap
    def rule(axis_size, in_batched, x, weight, thresholds):
        if not any(jax.tree.leaves(in_batched[1:])):
            y = product(x.reshape(-1, x.shape[-1]), weight, thresholds)
            return y.reshape(axis_size, -1, y.shape[-1]), True
        leaves, treedef = jax.tree.flatten((x, weight, thresholds))
        mapped = jax.tree.leaves(in_batched)

        def one(i):
            picked = [
                jax.lax.dynamic_index_in_dim(a, i, keepdims=False) if b else a
                for a, b in zip(leaves, mapped, strict=True)
            ]
            return product(*jax.tree.unflatten(treedef, picked))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return product(x, weight, thresholds)


def _fwd(implementation: str | None, x: Any, weight: Any, thresholds: Any) -> Any:
    # The product with its own derivatives, for gradients of gradients.
    return _product(implementation, x, weight, thresholds), (x, weight, thresholds)


def _bwd(implementation: str | None, residuals: tuple, cotangent: Any) -> Any:
    del implementation
    _, pullback = jax.vjp(masked.sparse_matmul, *residuals)
    dx, dweight, _ = pullback(cotangent)
    return dx, dweight, jnp.zeros_like(residuals[2])


_product = jax.custom_vjp(_batched_run, nondiff_argnums=(0,))
_product.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnums=0)
def _run(implementation: str | None, x: Any, weight: Any, thresholds: Any) -> Any:
    """Runs one implementation, or the best one on the platform that is compiled for here."""
    if x.shape[0] == 0:
        return jnp.zeros((0, matrix_shape(weight)[1]), x.dtype)
    return SPARSE_MATMUL.run(implementation, (x, weight, thresholds), {})
