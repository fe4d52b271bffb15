"""Gradients with respect to a compressed weight, as if it were dense."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lutjax.arrays import CompressedArray, WrapperArray
from lutjax.dtypes import widened


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ProbedArray(WrapperArray):
    """``W + delta`` for a ``delta`` that is zero: its gradient is that of the dense weight.

    Products run on the compressed base alone; ``delta`` takes part in the backward pass only.

    Attributes:
      base: The compressed weight.
      delta: ``float32[*batch, K, N]`` of zeros.

    >>> import lutjax
    >>> base = lutjax.quantize({"kernel": jnp.eye(32)}, bits=4, group_size=32)["kernel"]
    >>> loss = lambda delta: ProbedArray(base, delta).matmul(jnp.ones((1, 32))).sum()
    >>> jax.grad(loss)(jnp.zeros((32, 32))).sum().item()
    1024.0
    """

    base: CompressedArray
    delta: Float[Array, "*batch k n"]

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense sum."""
        return self.base.materialize_matrix() + self.delta.astype(self.dtype)

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W``."""
        y = self.base.matmul(x, out_dtype=out_dtype)
        return _tap(False, y, jax.lax.stop_gradient(x), self.delta)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``."""
        y = self.base.matmul_transposed(x, out_dtype=out_dtype)
        return _tap(True, y, jax.lax.stop_gradient(x), self.delta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(transpose: bool, y: jax.Array, x: jax.Array, delta: jax.Array) -> jax.Array:
    """``y``; in the backward pass ``delta`` receives the gradient of W in ``y = x @ W``."""
    return y


def _tap_forward(transpose, y, x, delta):
    return y, (x, delta)


def _tap_backward(transpose, residuals, dy):
    x, delta = residuals
    rows, ends = widened(x, dy.dtype), widened(dy, x.dtype)
    left, right = (ends, rows) if transpose else (rows, ends)
    batch = delta.shape[:-2]
    left, right = (a.reshape(*batch, -1, a.shape[-1]) for a in (left, right))
    gradient = jnp.einsum("...mk,...mn->...kn", left, right, preferred_element_type=jnp.float32)
    return dy, jnp.zeros_like(x), gradient.astype(delta.dtype)


_tap.defvjp(_tap_forward, _tap_backward)
