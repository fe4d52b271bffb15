"""Several texts packed into a row must not see each other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.models import Decoder, init_cache

ALTERNATING = {"sliding_window": 3, "sliding_layers": (True, False), "sliding_rope_theta": 50.0}


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 1}, {"num_layers": 1, "sliding_window": 3}, ALTERNATING],
    ids=["all", "window", "alternating"],
)
def test_packed_texts_have_the_logits_of_texts_alone(tiny_config, change):
    config = dataclasses.replace(tiny_config, **change)
    model = Decoder(config)
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, n) for n in (5, 3, 4)]
    row = np.concatenate([*texts, [0, 0]])[None].astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 3 + [3] * 4 + [0] * 2], np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), row)
    packed = np.asarray(apply(variables, row, segments=segments))
    assert np.isfinite(packed).all()
    # The same shape for all, so that there is one compilation.
    padded = np.zeros((len(texts), row.shape[1]), np.int32)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
    alone = np.asarray(apply(variables, padded))
    start = 0
    for i, text in enumerate(texts):
        # Sums over masked entries are exact zeros; rotary angles are those of the same positions.
        np.testing.assert_allclose(
            packed[0, start : start + len(text)], alone[i, : len(text)], atol=1e-5
        )
        start += len(text)


def test_segments_refuse_a_cache_and_a_mask(tiny_config):
    model = Decoder(tiny_config)
    tokens = jnp.zeros((1, 2), jnp.int32)
    for other in ({"mask": tokens == 0}, {"cache": init_cache(tiny_config, 1, 4)}):
        with pytest.raises(ValueError, match="segments cannot be combined"):
            model.init(jax.random.key(0), tokens, segments=tokens + 1, **other)
