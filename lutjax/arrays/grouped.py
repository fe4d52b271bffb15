"""Products of tiles of rows, each with one entry of a stacked weight, such as one of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platforms import compiling_for


def entry(weight: Any, index: jax.Array) -> Any:
    """One entry of a weight's first batch axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), weight)


def map_tiles(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    weight: Any,
    x: Float[Array, "t m k"],
    groups: Int[Array, " t"],
    sizes: Int[Array, " t"],
) -> Float[Array, "t m n"]:
    """``product(groups[i], x[i])`` for each tile; zeros where ``sizes[i]`` is 0.

    Args:
      product: Of rows and an entry of ``weight``.
      weight: A compressed array with one batch axis.
      x: Tiles of rows.
      groups: The entry that each tile meets.
      sizes: How many rows of a tile count.
    """
    on_cpu = compiling_for("cpu")
    # Copies of all entries that are met, for one product of them all, where they are no larger than
    # the weight. On a CPU XLA copies them slower than they are multiplied.
    if len(groups) <= weight.batch_shape[0] and not on_cpu:
        return jax.vmap(product)(groups, x)
    zeros = jax.eval_shape(product, groups[0], x[0])

    def one(tile: tuple[jax.Array, ...]) -> jax.Array:
        rows, group, size = tile
        if not on_cpu:  # a GPU would wait for the answer
            return product(group, rows)
        nothing = jnp.zeros(zeros.shape, zeros.dtype)
        return jax.lax.cond(size > 0, product, lambda *_: nothing, group, rows)

    # The backward pass would otherwise keep the entry of every tile.
    return jax.lax.map(jax.checkpoint(one, prevent_cse=False), (x, groups, sizes))
