"""Conversion between unrolled and scanned decoder parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks `layers/{i}/…` on a new leading axis, as `scan_layers=True` expects them.

    Leaves may be any registered pytree whose arrays all take a leading axis.

    Args:
      params: unrolled parameters.

    Returns:
      The same tree with `layers/…` arrays of shape `[L, …]`.

    Raises:
      ValueError: if `params["layers"]` is not numbered 0 … L-1.

    >>> params = {"layers": {"0": {"w": jnp.zeros(2)}, "1": {"w": jnp.ones(2)}}}
    >>> stack_layers(params)["layers"]["w"].shape
    (2, 2)
    """
    layers = params["layers"]
    names = [str(i) for i in range(len(layers))]
    if set(names) != set(layers):
        raise ValueError(
            f"params['layers'] has the keys {sorted(layers)[:5]}…, not '0' … '{len(layers) - 1}'; "
            "these parameters may be stacked already"
        )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[name] for name in names))
    return {**params, "layers": stacked}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`.

    Args:
      params: parameters whose `layers/…` arrays all have the leading axis L.

    Returns:
      The same tree with `layers/{i}/…`.

    Raises:
      ValueError: if the arrays under `layers` disagree about L.

    >>> params = {"layers": {"w": jnp.zeros((2, 3))}}
    >>> sorted(unstack_layers(params)["layers"])
    ['0', '1']
    """
    layers = params["layers"]
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(layers)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"params['layers'] has arrays with leading axes {sorted(lengths)}; all arrays of "
            "stacked layers must have the same"
        )
    ((length,),) = lengths
    unstacked = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(length)}
    return {**params, "layers": unstacked}
