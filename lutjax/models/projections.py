"""Several projections of the same activations, apart or as one matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names of matrices that multiply the same activations, by the name of the one they can be."""


def project(
    module: nn.Module,
    fused: str,
    sizes: Mapping[str, int],
    layer: Callable[[str, int], nn.Module],
    *inputs: Any,
) -> list[Float[Array, "... n"]]:
    """The projections `FUSED[fused]` of the same inputs.

    They are one product where the parameters have one matrix for all (`lutjax.fuse_projections`);
    new parameters have one for each.

    Args:
      module: whose projections they are.
      fused: the name of the one matrix.
      sizes: the columns of each projection.
      layer: makes the layer of a name and a number of columns.
      *inputs: what layers take.

    Returns:
      What each projection gives.
    """
    assert tuple(sizes) == FUSED[fused]
    if not module.has_variable("params", fused):
        return [layer(name, size)(*inputs) for name, size in sizes.items()]
    *starts, columns = itertools.accumulate(sizes.values())
    return jnp.split(layer(fused, columns)(*inputs), starts, axis=-1)
