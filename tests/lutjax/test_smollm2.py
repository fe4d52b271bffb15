"""The dense model against transformers' figures for the same weights (see tests/data/smollm2)."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.evaluate import perplexity
from lutjax.models import MODELS, generate

PROMPTS = ("france", "chat")


def test_the_file_is_the_one_the_figures_were_taken_with(smollm2):
    digest = hashlib.sha256(smollm2.path.read_bytes()).hexdigest()
    assert digest == smollm2.reference["gguf_sha256"]
    assert smollm2.model.config == MODELS["smollm2-135m"]


@pytest.mark.parametrize("name", PROMPTS)
def test_token_ids(smollm2, name):
    prompt = smollm2.reference["prompts"][name]
    assert smollm2.tokenizer.encode(prompt["text"]) == prompt["token_ids"]
    assert (
        smollm2.tokenizer.decode(prompt["token_ids"], skip_special_tokens=False) == prompt["text"]
    )


def test_chat_template(smollm2):
    rendered = smollm2.tokenizer.render_chat(
        [{"role": "user", "content": "Name three primary colours."}]
    )
    assert rendered == smollm2.reference["prompts"]["chat"]["text"]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(smollm2, name):
    prompt = smollm2.reference["prompts"][name]
    tokens = jnp.array([prompt["token_ids"]], jnp.int32)
    logits = np.asarray(jax.jit(smollm2.model.apply)({"params": smollm2.params}, tokens))[0]
    # Both are float32; transformers differs from float64 by up to 6e-5 on these prompts.
    np.testing.assert_allclose(logits[-1], smollm2.logits[name], rtol=0, atol=5e-4)
    assert logits.argmax(-1).tolist() == prompt["per_position_argmax"]


def test_greedy_continuations_without_cache(smollm2):
    apply = jax.jit(smollm2.model.apply)
    expected = [smollm2.reference["prompts"][name]["greedy20_ids"] for name in PROMPTS]
    rows = [smollm2.reference["prompts"][name]["token_ids"] for name in PROMPTS]
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((2, 64), np.int32)  # what follows a token cannot change its logits
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    for _ in range(20):
        logits = apply(
            {"params": smollm2.params}, jnp.asarray(tokens), logits_at=lengths[:, None] - 1
        )
        tokens[np.arange(2), lengths] = np.asarray(logits)[:, 0].argmax(-1)
        lengths += 1
    found = [tokens[row, n - 20 : n].tolist() for row, n in enumerate(lengths)]
    assert found == expected


def test_greedy_continuations_with_cache(smollm2):
    prompts = [smollm2.reference["prompts"][name]["token_ids"] for name in PROMPTS]
    found = generate(
        smollm2.model.apply,
        smollm2.params,
        prompts,
        config=smollm2.model.config,
        max_new_tokens=20,
    )
    assert found == [smollm2.reference["prompts"][name]["greedy20_ids"] for name in PROMPTS]


def test_perplexity(smollm2):
    some = slice(None, None, 5)  # 4 of 16: one takes two seconds
    result = perplexity(smollm2.model.apply, smollm2.params, smollm2.windows[some])
    expected = np.array(smollm2.reference["window_nll"])
    # float32 against float32; both are within 1e-4 nats of float64 on every window.
    np.testing.assert_allclose(result.window_nll, expected[some], rtol=0, atol=1e-4)
    assert result.perplexity == pytest.approx(np.exp(expected[some].mean()), rel=1e-4)
    assert result.tokens == 4 * 511
