"""Sensitivities to noise against losses whose curvature is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax import Recipe, Rule
from lutjax.calibrate import next_token_loss, noise_sensitivities
from lutjax.transforms.recipe import LutConfig

KEY = jax.random.key(0)


def test_the_next_token_loss_takes_a_sequence_or_several():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    loss = next_token_loss(lambda variables, tokens: variables["params"][tokens])
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    one, other = (float(loss(table, row)) for row in tokens)
    assert float(loss(table, tokens)) == pytest.approx((one + other) / 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"int\[B, T\]"):
        loss(table, tokens[0, 0])


def quadratic(params, batch):
    """Slopes, which cancel, and curvatures 2 and 6."""
    a, b = params["a"], params["b"]["kernel"]
    return batch * (jnp.sum(a) + jnp.sum(jnp.square(a)) + 3 * jnp.sum(jnp.square(b - 1)))


def make_params():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, 30), (2, 50, 20)))
    return {"a": a, "b": {"kernel": b, "bias": jnp.ones(3)}, "norm": jnp.ones((4, 4))}


def test_of_a_quadratic_loss_they_are_exact():
    params = make_params()
    recipe = Recipe((Rule("*", LutConfig(group_size="column")),), dense=("norm",))
    batches = [jnp.float32(0.5), jnp.float32(1.5)]  # their mean is 1
    found = noise_sensitivities(
        quadratic, params, batches, key=KEY, relative_error=0.5, recipe=recipe
    )
    squares = {"a": jnp.square(params["a"]).sum(), "b": jnp.square(params["b"]["kernel"]).sum()}
    # The noise differs between the batches, but a quadratic loss does not mind. float32 losses of
    # thousands.
    assert found == {
        "a": pytest.approx(float(squares["a"]), rel=1e-4),
        "b/kernel": pytest.approx(3 * float(squares["b"]), rel=1e-4),
    }


def test_a_cache_goes_on_where_a_call_stopped(tmp_path):
    params, batches = make_params(), [jnp.float32(0.5), jnp.float32(1.5)]
    recipe = Recipe((Rule("*", LutConfig(group_size="column")),), dense=("norm",))
    arguments = {"key": KEY, "recipe": recipe, "cache": tmp_path / "noise.jsonl"}
    expected = noise_sensitivities(quadratic, params, batches, **arguments)
    lines = [line for line in arguments["cache"].read_text().splitlines() if line]
    assert len(lines) == len(expected) == 2
    arguments["cache"].write_text(lines[0] + '\n{"id": "torn')
    calls = []

    def counting(params, batch):
        jax.debug.callback(lambda: calls.append(1), ordered=True)
        return quadratic(params, batch)

    assert noise_sensitivities(counting, params, batches, **arguments) == expected
    jax.effects_barrier()
    assert len(calls) == 3 * len(batches)  # without noise, and twice for the one that is missing
    assert noise_sensitivities(counting, params, batches, **arguments) == expected
    jax.effects_barrier()
    assert len(calls) == 3 * len(batches)  # nothing is measured again
    with pytest.raises(ValueError, match="made from other weights: 'a' differs"):
        other = params | {"norm": params["norm"] + 1}
        noise_sensitivities(quadratic, other, batches, **arguments)


def test_noise_of_stacked_matrices_is_relative_to_each():
    seen = []

    def loss(params, scale):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), params["kernel"], ordered=True)
        return scale * jnp.sum(params["kernel"] ** 2)

    weight = jnp.stack([jnp.ones((16, 8)), 100 * jnp.ones((16, 8))])
    noise_sensitivities(loss, {"kernel": weight}, [1.0], key=KEY, relative_error=0.04)
    jax.effects_barrier()
    _, plus, minus = seen
    np.testing.assert_allclose(plus + minus, 2 * np.asarray(weight), rtol=1e-5)
    noise = (plus - minus) / 2
    expected = 0.2 * np.linalg.norm(np.asarray(weight), axis=(1, 2))
    np.testing.assert_allclose(np.linalg.norm(noise, axis=(1, 2)), expected, rtol=1e-4)


def test_they_repeat_and_do_not_depend_on_other_weights():
    params = make_params()
    first, again = (
        noise_sensitivities(quadratic, params, [1.0], key=KEY, recipe=Recipe.higgs())  # K < 512
        for _ in range(2)
    )
    assert first == again
    alone = Recipe((Rule("a", LutConfig()),))
    only = noise_sensitivities(quadratic, params, [1.0], key=KEY, recipe=alone)
    assert only == {"a": first["a"]}


def test_what_bends_down_is_zero():
    found = noise_sensitivities(
        lambda params, _: -jnp.sum(params["kernel"] ** 2),
        {"kernel": jnp.ones((16, 16))},
        [None],
        key=KEY,
    )
    assert found == {"kernel": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches is empty"),
        ({"relative_error": 0.0}, "relative_error=0.0"),
        ({"params": {"kernel": jnp.full((16, 16), jnp.nan)}}, "'kernel' has 256 NaN"),
        ({"params": {"bias": jnp.ones(3)}}, "reaches no matrix"),
        ({"loss_fn": lambda params, batch: jnp.inf}, "the loss is NaN or infinite"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "loss_fn": lambda params, batch: jnp.sum(params["kernel"]),
        "params": {"kernel": jnp.ones((16, 16))},
        "batches": [None],
    }
    with pytest.raises(ValueError, match=message):
        noise_sensitivities(**(arguments | change), key=KEY)
