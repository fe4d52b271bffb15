from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.models import greedy, sample

DRAWS = 4000


def frequencies(logits, **arguments):
    """How often each token is drawn in many rows with the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    drawn = sample(rows, jax.random.key(0), **arguments)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / DRAWS


PROBABILITIES = np.array([0.05, 0.4, 0.3, 0.15, 0.1])
LOGITS = np.log(PROBABILITIES)
# Four standard deviations of a frequency of 4000 draws.
ATOL = 4 * 0.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    found = frequencies(LOGITS, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.05}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.6}, [1, 2]),
        ({"top_p": 0.8}, [1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2, "top_p": 0.5}, [1]),  # after top_k, token 1 alone has 4/7
    ],
)
def test_restrictions(arguments, kept):
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    found = frequencies(LOGITS, temperature=1.0, **arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)
    assert set(np.flatnonzero(found)) == set(kept)


def test_top_p_keeps_the_lowest_of_tied_tokens():
    found = frequencies([0.0, 1.0, 1.0, 1.0, 1.0, -1.0], temperature=1.0, top_p=0.3)
    assert set(np.flatnonzero(found)) == {1, 2}  # each of the four has 0.22


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
@pytest.mark.parametrize("arguments", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_tiny_temperatures_are_greedy(temperature, arguments):
    found = frequencies([-20.0, 30.0, 40.0, 39.5], temperature=temperature, **arguments)
    assert found.tolist() == [0, 0, 1, 0]


def test_rows_are_independent():
    logits = jnp.array([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0]])
    assert sample(logits, jax.random.key(0), 1.0, top_k=1).tolist() == [1, 0]
    assert greedy(logits).tolist() == [1, 0]


def test_the_same_key_draws_the_same():
    logits = jax.random.normal(jax.random.key(1), (64, 50))
    first, again = (sample(logits, jax.random.key(7), 1.0) for _ in range(2))
    other = sample(logits, jax.random.key(8), 1.0)
    assert first.tolist() == again.tolist() != other.tolist()
