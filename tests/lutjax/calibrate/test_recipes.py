"""What takes a recipe checks it as `quantize` does."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from lutjax import calibrate
from lutjax.transforms.recipe import LutConfig, Recipe, Rule

PARAMS = {"mlp": {"kernel": jnp.ones((32, 16))}}
X = jnp.ones((2, 3, 32))


def product(params, x):
    return x @ params["mlp"]["kernel"]


def loss(params, x):
    return product(params, x).sum()


CALLS = {
    "fisher": lambda recipe: calibrate.fisher(loss, PARAMS, [X], recipe=recipe),
    "hessians": lambda recipe: calibrate.hessians(product, PARAMS, [X], recipe=recipe),
    "activation_quantiles": lambda recipe: calibrate.activation_quantiles(
        product, PARAMS, [X], recipe=recipe
    ),
    "plannable": lambda recipe: calibrate.plannable(PARAMS, recipe),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_recipe_or_reaches_nothing_is_refused(call):
    with pytest.raises(TypeError, match="the recipe is a LutConfig; give a Recipe, such as"):
        call(LutConfig())
    with pytest.raises(ValueError, match="the recipe has no rules"):
        call(Recipe(()))
    typo = Recipe((Rule("mpl/*", LutConfig()), Rule("*", LutConfig())))
    with pytest.raises(ValueError, match=r"'mpl/\*' matches no parameter; similar .*mlp/kernel"):
        call(typo)
    assert call(Recipe((Rule("mlp/*", LutConfig()), Rule("*", LutConfig()))))
