from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.evaluate import perplexity, windows


def bigram(variables, tokens):
    """A model that knows only the token before: logits are rows of a table."""
    return variables["params"][tokens]


def oracle(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    table = table.astype(np.float64)
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    return np.array([-np.mean([log_p[a, b] for a, b in pairwise(r)]) for r in rows])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_perplexity_of_a_bigram_model(batch_size):
    table = np.asarray(jax.random.normal(jax.random.key(0), (11, 11)))
    rows = np.asarray(jax.random.randint(jax.random.key(1), (5, 9), 0, 11))
    result = perplexity(bigram, jnp.asarray(table), rows, batch_size=batch_size)
    # float32 sums of at most 11 terms of order 1.
    np.testing.assert_allclose(result.window_nll, oracle(table, rows), rtol=1e-5)
    assert result.mean_nll == pytest.approx(np.mean(result.window_nll))
    assert result.perplexity == pytest.approx(np.exp(result.mean_nll))
    assert result.tokens == 5 * 8


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    result = perplexity(bigram, jnp.zeros((7, 7)), np.zeros((2, 5), np.int32))
    assert result.perplexity == pytest.approx(7, rel=1e-6)


def test_windows_follow_the_protocol():
    tokens = list(range(100))
    found = windows(tokens, window=8, chunks=5)
    n = 100 // 8
    expected = [tokens[(i * n) // 5 * 8 : ((i * n) // 5 + 1) * 8] for i in range(5)]
    assert found.tolist() == expected
    assert found.dtype == np.int32


def test_windows_of_a_short_text_are_not_repeated():
    assert windows(range(10), window=3, chunks=16).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [1, 2, 3], "window": 4}, "3 tokens, fewer than window=4"),
        ({"tokens": [], "window": 4}, "0 tokens"),
        ({"tokens": [1, 2, 3], "window": 1}, "window=1"),
        ({"tokens": [1, 2, 3], "window": 2, "chunks": 0}, "chunks=0"),
    ],
)
def test_windows_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(**arguments)


@pytest.mark.parametrize(
    ("rows", "batch_size", "message"),
    [
        (np.zeros((4,), np.int32), 1, r"\(4,\)"),
        (np.zeros((4, 1), np.int32), 1, r"\(4, 1\)"),
        (np.zeros((0, 4), np.int32), 1, r"\(0, 4\)"),
        (np.zeros((4, 4), np.int32), 0, "batch_size=0"),
        (np.full((4, 4), 7, np.int32), 1, "token 7 .* none of the model's 7"),
        (np.full((4, 4), -1, np.int32), 1, "token -1"),
    ],
)
def test_perplexity_refuses(rows, batch_size, message):
    with pytest.raises(ValueError, match=message):
        perplexity(bigram, jnp.zeros((7, 7)), rows, batch_size=batch_size)
