"""SPAM against its formula in float64, and steps with NaN."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lutjax.optim import check_finite, galore, leaf_name, scale_by_spam, skip_nonfinite, spam


def spam_oracle(gradients, threshold, reset_every, warmup, clip_after):
    """Directions of each step, written from the paper."""
    b1, b2, directions = 0.9, 0.999, []
    for t, g in enumerate(gradients):
        age = t % reset_every
        if age == 0:
            m, v = np.zeros_like(g), np.zeros_like(g)
        if age >= clip_after:
            spike = (v > 0) & (g**2 > threshold * v)
            g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        factor = 1.0
        if t >= reset_every and age < warmup:
            factor = 1 - (1 + np.cos(np.pi * (age + 1) / (warmup + 1))) / 2
        m_hat, v_hat = m / (1 - b1 ** (age + 1)), v / (1 - b2 ** (age + 1))
        directions.append(factor * m_hat / (np.sqrt(v_hat) + 1e-8))
    return np.stack(directions)


def test_spam_follows_its_formula_through_spikes_and_resets():
    settings = {"threshold": 50.0, "reset_every": 12, "warmup": 5, "clip_after": 3}
    gradients = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    gradients[[8, 20], [1, 4]] = [1000.0, -500.0]
    optimizer = scale_by_spam(**settings)

    def step(state, g):
        updates, state = optimizer.update(g, state)
        return state, updates

    start = optimizer.init(jnp.zeros(6))
    _, actual = jax.jit(lambda g: jax.lax.scan(step, start, g))(jnp.asarray(gradients))
    expected = spam_oracle(gradients.astype(np.float64), **settings)
    # float32 against float64: 1 - 0.999 loses four digits in the first steps after a reset.
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4)
    unclipped = spam_oracle(gradients.astype(np.float64), **settings | {"threshold": 1e12})
    assert np.abs(expected - unclipped).max() > 0.5  # the spikes do matter


def test_spam_moves_entries_whose_first_gradient_comes_late():
    optimizer = scale_by_spam(reset_every=100, clip_after=3)
    state, update = optimizer.init(jnp.zeros(2)), jax.jit(optimizer.update)
    for step in range(10):
        updates, state = update(jnp.array([1.0, float(step >= 5)]), state)
    assert (np.asarray(updates) > 0.5).all()


def test_spam_can_be_injected_without_static_arguments():
    params = jnp.ones(3)
    optimizer = optax.inject_hyperparams(spam)(learning_rate=0.1, reset_every=2, warmup=3)
    plain = spam(0.1, reset_every=2, warmup=3)
    state, expected_state = optimizer.init(params), plain.init(params)
    for _ in range(4):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        expected, expected_state = jax.jit(plain.update)(params, expected_state)
        # float32; hyperparameters are rounded to it before they are used.
        np.testing.assert_allclose(updates, expected, rtol=1e-4)


def test_spam_refuses_a_reset_every_zero_steps():
    with pytest.raises(ValueError, match="reset_every=0"):
        scale_by_spam(reset_every=0)


def test_a_step_with_nan_is_skipped_and_named():
    optimizer = skip_nonfinite(galore(0.1, rank=2, refresh_every=1))
    params = {"a": jnp.ones(3), "block": {"w": jnp.ones((4, 6))}}
    good = jax.tree.map(lambda p: p + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), params)
    bad = {"a": good["a"], "block": {"w": good["block"]["w"].at[1, 2].set(jnp.inf)}}
    update = jax.jit(optimizer.update)
    _, state = update(good, jax.jit(optimizer.init)(params), params)
    updates, after = update(bad, state, params)
    chex.assert_trees_all_equal(after.inner, state.inner)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
    assert int(state.skipped) == 0 and int(after.skipped) == 1
    assert leaf_name(params, int(after.last)) == "block/w"
    updates, again = update(good, after, params)
    chex.assert_tree_all_finite(updates)
    assert int(again.skipped) == 1
    with pytest.raises(FloatingPointError, match="gradient of 'block/w'"):
        check_finite(bad)
    check_finite(good)
    assert optax.tree.get(again, "skipped") == 1


@pytest.mark.parametrize(
    ("of_gradients", "of_params"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)],
    ids=["bfloat16_gradients", "bfloat16_parameters"],
)
def test_skipping_takes_gradients_of_another_dtype_than_parameters(of_gradients, of_params):
    optimizer, params = skip_nonfinite(optax.adam(0.1)), jnp.ones(3, of_params)
    plain, _ = optax.adam(0.1).update(
        jnp.ones(3, of_gradients), optax.adam(0.1).init(params), params
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for value in (jnp.nan, 1.0):
        updates, state = update(jnp.full(3, value, of_gradients), state, params)
        assert updates.dtype == plain.dtype
        assert np.asarray(updates).any() == (value == 1.0)
    assert int(state.skipped) == 1


def test_a_reset_clears_what_has_overflowed():
    optimizer = scale_by_spam(reset_every=4, warmup=1)
    state = optimizer.init(jnp.ones(2))
    for step in range(6):
        updates, state = optimizer.update(jnp.array([1e20 if step == 1 else 1.0, 1.0]), state)
    np.testing.assert_allclose(updates[0], updates[1])  # two steps after the reset
    assert np.isfinite(state.nu).all()
