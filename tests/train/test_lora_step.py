"""What a step counts, by a model that gives away its scores."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.lora_step import Batch, Trained, make_step, next_token


@pytest.mark.parametrize(
    "scores,expected",
    [
        ([0.0, 0.0, 0.0, 0.0], 0.25),  # nothing is preferred
        ([3.0, 1.0, 1.0, 1.0], 1.0),
        ([1.0, 3.0, 1.0, 1.0], 0.0),
        ([2.0, 2.0, 0.0, 0.0], 0.5),
    ],
)
def test_ties_are_not_taken_for_knowledge(scores, expected):
    def model(variables, tokens, *_, **__):
        return jnp.broadcast_to(jnp.array(scores), (*tokens.shape, 4))

    step = make_step(next_token(model), optax.sgd(1.0))
    tokens = jnp.zeros((1, 2, 3), jnp.int32)
    targets = tokens.at[..., -1].set(-1)
    sums = step.evaluate(Trained({}), {}, Batch(tokens, jnp.ones_like(tokens), targets))
    assert float(sums.targets) == 4
    np.testing.assert_allclose(float(sums.correct) / 4, expected)


def test_only_the_logits_that_are_needed_are_asked_for():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)
    asked = []

    def model(variables, tokens, *, segments, logits_at=None):
        asked.append(None if logits_at is None else logits_at.shape)
        logits = scores[tokens]
        if logits_at is None:
            return logits
        return jnp.take_along_axis(logits, logits_at[..., None], axis=1)

    step = make_step(next_token(model), optax.sgd(1.0))
    tokens = jnp.asarray(rng.integers(0, 5, (1, 2, 6)), jnp.int32)
    targets = jnp.full_like(tokens, -1).at[0, 0, 3].set(2).at[0, 1, 1].set(4).at[0, 1, 4].set(0)
    ones = jnp.ones_like(tokens)
    whole = step.evaluate(Trained({}), {}, Batch(tokens, ones, targets))
    at = jnp.asarray([[[3, 0], [1, 4]]], jnp.int32)
    learnt = jnp.asarray([[[2, -1], [4, 0]]], jnp.int32)
    few = step.evaluate(Trained({}), {}, Batch(tokens, ones, learnt, at))
    assert asked == [None, (2, 2)]
    assert float(few.targets) == 3
    for found, expected in zip(few, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
