"""Gradients with respect to a compressed weight, as if it were dense."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays import CompressedArray, MatrixView


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "delta"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ProbedArray(CompressedArray):
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

    @property
    def view(self) -> MatrixView:  # type: ignore[override]
        """The view of the base."""
        return self.base.view

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """The dtype of the base."""
        return self.base.dtype

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading axes that base and delta share."""
        return self.base.batch_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """K and N."""
        return self.base.matrix_shape

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense sum."""
        return self.base.materialize_matrix() + self.delta.astype(self.dtype)

    def matmul(self, x: Float[Array, "*batch m k"]) -> Float[Array, "*batch m n"]:
        """``x @ W``."""
        return _tap(False, self.base.matmul(x), jax.lax.stop_gradient(x), self.delta)

    def matmul_transposed(self, x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m k"]:
        """``x @ W.T``."""
        return _tap(True, self.base.matmul_transposed(x), jax.lax.stop_gradient(x), self.delta)

    def with_view(self, view: MatrixView) -> Self:
        """The same data under another view."""
        return dataclasses.replace(self, base=self.base.with_view(view))

    def astype(self, dtype: Any) -> Self:
        """The same data standing for a weight of another dtype."""
        return dataclasses.replace(self, base=self.base.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(transpose: bool, y: jax.Array, x: jax.Array, delta: jax.Array) -> jax.Array:
    """``y``; in the backward pass ``delta`` receives the gradient of W in ``y = x @ W``."""
    return y


def _tap_forward(transpose, y, x, delta):
    return y, (x, delta)


def _tap_backward(transpose, residuals, dy):
    x, delta = residuals
    left, right = (dy, x) if transpose else (x, dy)
    batch = delta.shape[:-2]
    left, right = (a.reshape(*batch, -1, a.shape[-1]) for a in (left, right))
    gradient = jnp.einsum("...mk,...mn->...kn", left, right, preferred_element_type=jnp.float32)
    return dy, jnp.zeros_like(x), gradient.astype(delta.dtype)


_tap.defvjp(_tap_forward, _tap_backward)
