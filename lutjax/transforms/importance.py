"""How much each entry of a weight matters: the Fisher diagonal, whole or as two means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax.arrays import MatrixView
from lutjax.tracing import concrete

# Below this fraction of the largest side weight, dividing by it would only amplify rounding errors.
_FLOOR = 1e-4


class RowColumnMeans(NamedTuple):
    """The means of a Fisher diagonal over the columns and over the rows of the stored matrix.

    They stand for ``F[k, n] = rows[k] * columns[n] / mean``, which has the same row and column
    means.

    Attributes:
      rows: ``float32[*batch, K]``, the mean of each row.
      columns: ``float32[*batch, N]``, the mean of each column.
    """

    rows: Float[Array, "*batch k"]
    columns: Float[Array, "*batch n"]


Importance = Float[Array, "*batch k n"] | RowColumnMeans


def check_importance(
    fisher: Any, shape: tuple[int, ...], batch_ndim: int, view: MatrixView, path: str
) -> Importance:
    """Brings what a caller gives as Fisher information into the form of the stored matrix.

    Args:
      fisher: An array of the weight's logical shape, or a pair (row means, column means).
      shape: The weight's logical shape.
      batch_ndim: Its number of batch axes.
      view: How it is stored.
      path: Names it in errors.

    Returns:
      ``float32[*batch, K, N]`` or :class:`RowColumnMeans`.

    Raises:
      ValueError: If shapes do not fit, or a value is negative, NaN or infinite.
    """
    batch = shape[:batch_ndim]
    k, n = view.matrix_shape(shape[batch_ndim:])
    if isinstance(fisher, Sequence):
        rows, columns = (jnp.asarray(side, jnp.float32) for side in fisher)
        if rows.shape != (*batch, k) or columns.shape != (*batch, n):
            raise ValueError(
                f"the row and column means of the Fisher information of {path!r} have the shapes "
                f"{rows.shape} and {columns.shape}; its weight {shape} needs {(*batch, k)} and "
                f"{(*batch, n)}"
            )
        _check_values((rows, columns), path)
        return RowColumnMeans(rows, columns)
    full = jnp.asarray(fisher, jnp.float32)
    if full.shape != shape:
        raise ValueError(
            f"the Fisher information of {path!r} has the shape {full.shape}, its weight {shape}"
        )
    _check_values((full,), path)
    return view.to_matrix(full, batch_ndim)


def error_weights(fisher: Importance | None) -> Float[Array, "k n"]:
    """The root of the Fisher diagonal of one matrix, to multiply errors with; 1 without Fisher.

    >>> error_weights(RowColumnMeans(jnp.array([2.0, 4.0]), jnp.array([3.0]))).tolist()
    [[1.41...], [2.0]]
    """
    if fisher is None:
        return jnp.ones((1, 1), jnp.float32)
    if not isinstance(fisher, RowColumnMeans):
        return jnp.sqrt(fisher)
    mean = fisher.rows.mean()
    product = fisher.rows[:, None] * (fisher.columns / jnp.where(mean > 0, mean, 1))[None, :]
    return jnp.sqrt(product)


def side_weights(
    fisher: Importance | None, k: int, n: int
) -> tuple[Float[Array, " k"], Float[Array, " n"]]:
    """Diagonals ``D_row [K]``, ``D_col [N]`` that scale a matrix before its decomposition.

    The roots of the row and column means, relative to the largest. Zeros are lifted to a small
    positive number, so that they can be divided by; a Fisher diagonal of zeros weighs all alike.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.3).

    >>> side_weights(RowColumnMeans(jnp.array([4.0, 0.0]), jnp.array([0.0])), 2, 1)[0].tolist()
    [1.0, 9.99...e-05]
    """
    if fisher is None:
        return jnp.ones(k, jnp.float32), jnp.ones(n, jnp.float32)
    if isinstance(fisher, RowColumnMeans):
        means = fisher
    else:
        means = RowColumnMeans(fisher.mean(axis=-1), fisher.mean(axis=-2))
    return _relative_root(means.rows), _relative_root(means.columns)


def _relative_root(means: Float[Array, " m"]) -> Float[Array, " m"]:
    largest = means.max()
    root = jnp.sqrt(means / jnp.where(largest > 0, largest, 1))
    return jnp.where(largest > 0, jnp.maximum(root, _FLOOR), 1.0)


def _check_values(arrays: tuple[jax.Array, ...], path: str) -> None:
    for array in arrays:
        values = concrete(array)
        if values is None:
            continue
        if not np.isfinite(values).all():
            raise ValueError(
                f"the Fisher information of {path!r} has NaN or infinite values; calibrate again "
                f"with finite losses"
            )
        if (values < 0).any():
            raise ValueError(f"the Fisher information of {path!r} has negative values")
