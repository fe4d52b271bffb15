"""Compressed parameters back to dense ones."""

from __future__ import annotations

from typing import Any

import jax

from lutjax.arrays import is_compressed


def materialize(params: Any) -> Any:
    """Replaces every compressed array by the dense weight it stands for.

    Args:
      params: A pytree of parameters, dense leaves are left as they are; or one compressed array.

    Returns:
      The pytree with dense leaves.

    >>> import jax.numpy as jnp, lutjax
    >>> params = lutjax.quantize({"kernel": jnp.eye(32)}, bits=4, group_size=32)
    >>> bool((materialize(params)["kernel"] == jnp.eye(32)).all())
    True
    """
    return jax.tree.map(
        lambda leaf: leaf.materialize() if is_compressed(leaf) else leaf,
        params,
        is_leaf=is_compressed,
    )
