"""What a product adds after the kernel, in float32 and before the one rounding of the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST


def group_sums(x: jax.Array, groups: int, group_size: int) -> jax.Array:
    """Sums of ``x`` ``[M, K]`` over each group, ``float32[M, groups]``."""
    x = x.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, groups * group_size - x.shape[1])))
    return x.reshape(x.shape[0], groups, group_size).sum(axis=-1)


def add_offsets(
    y: jax.Array,
    x: jax.Array,
    offsets: jax.Array | None,
    *,
    k: int,
    group_size: int,
    transpose: bool,
) -> jax.Array:
    """Adds the product of ``x`` with the offsets alone to ``float32`` ``y``.

    The offsets are constant within a group, so a product with ``[groups, N]`` is enough.
    """
    if offsets is None:
        return y
    offsets = offsets.astype(jnp.float32)
    if not transpose:
        sums = group_sums(x, offsets.shape[0], group_size)
        return y + jnp.matmul(sums, offsets, precision=_EXACT)
    per_group = jnp.matmul(x.astype(jnp.float32), offsets.T, precision=_EXACT)
    return y + jnp.repeat(per_group, group_size, axis=1)[:, :k]
