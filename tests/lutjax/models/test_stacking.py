from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from lutjax.models import stack_layers, unstack_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """A leaf that is itself a pytree."""

    left: jax.Array
    right: jax.Array


def example(layers: int = 11):
    """More than ten layers, so that the order of the keys as text is not the order of numbers."""
    return {
        "norm": {"scale": jnp.ones(3)},
        "layers": {
            str(i): {"kernel": Pair(jnp.full((2, 3), float(i)), jnp.full(4, -float(i)))}
            for i in range(layers)
        },
    }


def test_stack_keeps_the_order_of_layers():
    stacked = stack_layers(example())["layers"]["kernel"]
    assert stacked.left[:, 0, 0].tolist() == list(range(11))
    assert stacked.right.shape == (11, 4)


def test_unstack_is_the_inverse():
    chex.assert_trees_all_equal(unstack_layers(stack_layers(example())), example())


def test_stacking_twice_is_refused():
    with pytest.raises(ValueError, match="may be stacked already"):
        stack_layers(stack_layers(example()))


def test_unstacking_unstacked_layers_is_refused():
    with pytest.raises(ValueError, match="leading axes"):
        unstack_layers(example())
