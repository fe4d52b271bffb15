from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.io.checkpoint import nest, parameter_shapes
from lutjax.models import Decoder, decode_step, generate, init_cache, prefill, stack_layers

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


@pytest.fixture
def model(tiny_config):
    return Decoder(tiny_config)


@pytest.fixture
def params(tiny_config):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.4, jnp.float32),
        nest(parameter_shapes(tiny_config)),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def greedy_without_cache(model, params, prompts, count):
    """The whole text is run again for each token; what follows a token cannot change it."""
    apply = jax.jit(model.apply)
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), model.config.max_position_embeddings), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    for _ in range(count):
        logits = apply({"params": params}, tokens, logits_at=lengths[:, None].astype(np.int32) - 1)
        tokens[np.arange(len(prompts)), lengths] = np.asarray(logits)[:, 0].argmax(-1)
        lengths += 1
    return [tokens[row, n - count : n].tolist() for row, n in enumerate(lengths)]


def test_batched_greedy_equals_one_by_one_without_cache(model, params):
    found = generate(model.apply, params, PROMPTS, config=model.config, max_new_tokens=6)
    assert found == greedy_without_cache(model, params, PROMPTS, 6)


def test_scanned_layers_generate_the_same(model, params):
    scanned = Decoder(dataclasses.replace(model.config, scan_layers=True))
    found = generate(
        scanned.apply, stack_layers(params), PROMPTS, config=scanned.config, max_new_tokens=4
    )
    assert found == generate(model.apply, params, PROMPTS, config=model.config, max_new_tokens=4)


def test_long_prompts_are_padded_to_whole_chunks_and_read_by_chunk(model, params, monkeypatch):
    for module in ("decoder", "generate"):
        monkeypatch.setattr(importlib.import_module(f"lutjax.models.{module}"), "CHUNK", 4)
    read = []

    def apply(variables, tokens, **kwargs):
        read.append(tokens.shape)
        return model.apply(variables, tokens, **kwargs)

    prompts = [*PROMPTS, [*range(18)]]
    found = generate(apply, params, prompts, config=model.config, max_new_tokens=4)
    assert read == [(4, 20), (4, 1)]
    assert found == greedy_without_cache(model, params, prompts, 4)


def test_memory_of_a_prefill_does_not_grow_with_the_square_of_the_prompt(model, params):
    def temporaries(time):
        tokens, cache = np.zeros((1, time), np.int32), init_cache(model.config, 1, time)
        lowered = prefill.lower(params, tokens, tokens == 0, cache, apply_fn=model.apply)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # With all scores at once it is 4.
    assert temporaries(8192) < 2.2 * temporaries(4096)


@pytest.mark.parametrize("layers", [(True, True), (True, False)])
def test_windows_generate_the_same_as_without_cache(model, params, layers, monkeypatch):
    for module in ("decoder", "generate"):
        monkeypatch.setattr(importlib.import_module(f"lutjax.models.{module}"), "CHUNK", 8)
    config = dataclasses.replace(model.config, sliding_window=5, sliding_layers=layers)
    model = Decoder(config)
    prompts = [*PROMPTS, [*range(18)]]
    found = generate(model.apply, params, prompts, config=config, max_new_tokens=12)
    assert found == greedy_without_cache(model, params, prompts, 12)


def test_stop_tokens_end_each_row(model, params):
    free = generate(model.apply, params, PROMPTS, config=model.config, max_new_tokens=6)
    stop = free[0][2]
    found = generate(
        model.apply, params, PROMPTS, config=model.config, max_new_tokens=6, stop_tokens={stop}
    )
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert found == expected
    assert len(found[0]) <= 2


def test_tokens_are_streamed_in_order(model, params):
    streamed: list[tuple[int, int]] = []
    found = generate(
        model.apply,
        params,
        PROMPTS,
        config=model.config,
        max_new_tokens=3,
        on_token=lambda row, token: streamed.append((row, token)),
    )
    assert [row for row, _ in streamed] == [0, 1, 2] * 3
    for row in range(3):
        assert [token for of, token in streamed if of == row] == found[row]


def test_sampling_depends_on_the_key_only(model, params):
    def draw(seed):
        return generate(
            model.apply,
            params,
            PROMPTS,
            config=model.config,
            max_new_tokens=8,
            temperature=5.0,
            top_p=0.99,
            key=jax.random.key(seed),
        )

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_top_1_is_greedy_at_any_temperature(model, params):
    arguments = {"config": model.config, "max_new_tokens": 4}
    drawn = generate(
        model.apply,
        params,
        PROMPTS,
        temperature=3.0,
        top_k=1,
        key=jax.random.key(0),
        **arguments,
    )
    assert drawn == generate(model.apply, params, PROMPTS, **arguments)


def test_prompts_of_similar_lengths_share_a_compilation(model, params):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return model.apply(*args, **kwargs)

    for prompt in ([1, 2], [3, 4, 5, 6, 7], list(range(16))):
        for count in (2, 9):
            generate(counted, params, [prompt], config=model.config, max_new_tokens=count)
    assert len(calls) == 2  # one trace of the prefill and one of the step


def test_the_longest_context_is_reached(model, params):
    limit = model.config.max_position_embeddings
    prompt = np.arange(limit - 5) % model.config.vocab_size
    found = generate(model.apply, params, [prompt.tolist()], config=model.config, max_new_tokens=5)
    assert found == greedy_without_cache(model, params, [prompt.tolist()], 5)


def test_decode_step_donates_the_cache(model, params):
    cache = init_cache(model.config, 1, 8)
    decode_step(params, jnp.array([1]), cache, apply_fn=model.apply)
    assert cache.layers[0].keys.is_deleted()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [2, 37]]}, "prompt 1 has a token outside 0 … 36: 37"),
        ({"prompts": [[-1]]}, "outside 0 … 36: -1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 128}, "exceeds the model's context of 128"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0}, "key"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_refuses(model, params, change, message):
    arguments = {"prompts": [[1]], "max_new_tokens": 1, "config": model.config} | change
    with pytest.raises(ValueError, match=message):
        generate(model.apply, params, **arguments)


def test_prompts_may_be_an_array(model, params):
    run = functools.partial(generate, model.apply, params, config=model.config, max_new_tokens=3)
    assert run(jnp.array([[1, 2], [3, 4]])) == run([[1, 2], [3, 4]])


@pytest.mark.parametrize("prompts", [["text"], [1, 2]])
def test_prompts_are_lists_of_ids(model, params, prompts):
    with pytest.raises(TypeError, match=r"prompt 0 is .*lists of token ids"):
        generate(model.apply, params, prompts, config=model.config, max_new_tokens=1)
