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
