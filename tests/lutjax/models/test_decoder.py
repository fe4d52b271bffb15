from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.io.checkpoint import nest, parameter_shapes
from lutjax.models import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    decoder,
    init_cache,
    stack_layers,
)
from lutjax.models.decoder import embed

GEMMA = {
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "tie_embeddings": True,
}
GEMMA2 = GEMMA | {
    "post_norms": True,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "sliding_window": 3,
    "sliding_layers": (True, False),
}
GEMMA3 = GEMMA | {
    "post_norms": True,
    "qk_norm": True,
    "rms_norm_eps": 1e-2,
    "rope_theta": 500.0,
    "rope_scaling": RopeScaling("linear", factor=4.0),
    "sliding_window": 3,
    "sliding_layers": (True, False),
    "sliding_rope_theta": 50.0,
}
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=32)
VARIANTS = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "rms_norm_eps": 1e-2},
    "mistral": {"sliding_window": 3},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear": {"rope_scaling": RopeScaling("linear", factor=4.0)},
    "factors": {"rope_scaling": RopeScaling("factors", factors=(1.0, 3.0, 8.0))},
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "experts": {"num_experts": 5, "num_experts_per_tok": 2},
    "gpt-oss": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "expert_bias": True,
        "qkv_bias": True,
        "o_bias": True,
        "attention_sinks": True,
        "activation": "gelu_sigmoid",
        "swiglu_limit": 0.4,
        "sliding_window": 3,
        "sliding_layers": (True, False),
        "rope_theta": 50.0,
        "rope_scaling": RopeScaling(
            "yarn", 8.0, 0.5, 4.0, 32, attention_factor=1.3, truncate=False
        ),
    },
    "yarn": {"rope_theta": 50.0, "rope_scaling": RopeScaling("yarn", 8.0, 0.5, 4.0, 32)},
    "experts, not normalised": {
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "qk_norm": True,
    },
    "multi-head": {"num_kv_heads": 4},
    "multi-query": {"num_kv_heads": 1},
}


def random_params(config: DecoderConfig):
    """Parameters with no zeros and no ones, so that every bias and scale counts."""
    rng = np.random.default_rng(0)
    shapes = nest(parameter_shapes(config))
    return jax.tree.map(
        lambda shape: jnp.asarray(
            rng.normal(size=shape) * (0.3 if len(shape) > 1 else 0.5), jnp.float32
        ),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run(config: DecoderConfig, params, tokens, **arguments):
    """`Decoder.apply`, compiled as a whole: faster here than one operation at a time."""
    return jax.jit(Decoder(config).apply)({"params": params}, tokens, **arguments)


def oracle_divisors(scaling: RopeScaling | None, frequencies: np.ndarray) -> np.ndarray:
    """As transformers' `modeling_rope_utils.py` writes them, one frequency at a time."""
    if scaling is None:
        return np.ones_like(frequencies)
    if scaling.kind == "linear":
        return np.full_like(frequencies, scaling.factor)
    if scaling.kind == "factors":
        return np.array(scaling.factors)
    if scaling.kind == "yarn":
        size = 2 * len(frequencies)
        base = frequencies[0] / frequencies[1]  # theta ** (2 / size)

        def index(turns):
            context = scaling.original_max_position_embeddings
            return math.log(context / (turns * 2 * math.pi)) / math.log(base)

        low, high = index(scaling.high_freq_factor), index(scaling.low_freq_factor)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramps = [min(max((i - low) / (high - low), 0), 1) for i in range(len(frequencies))]
        return np.array([1 / (ramp / scaling.factor + 1 - ramp) for ramp in ramps])
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        old = scaling.original_max_position_embeddings
        if wavelength < old / scaling.high_freq_factor:
            scaled = frequency
        elif wavelength > old / scaling.low_freq_factor:
            scaled = frequency / scaling.factor
        else:
            smooth = (old / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            scaled = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        divisors.append(frequency / scaled)
    return np.array(divisors)


def oracle(config: DecoderConfig, params, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] in float64, one head and one query at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    h, d = config.head_dim, config.num_heads // config.num_kv_heads

    def norm(x, scale):
        scale = config.norm_offset + scale
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def cap(x, bound):
        return x if bound is None else bound * np.tanh(x / bound)

    def activation(x):
        if config.activation == "gelu_tanh":
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        if config.activation == "gelu_sigmoid":
            return x / (1 + np.exp(-1.702 * x))
        return x / (1 + np.exp(-x))

    def turns(theta, scaling):
        frequencies = theta ** (-np.arange(h // 2) * 2 / h)
        frequencies = frequencies / oracle_divisors(scaling, frequencies)
        return np.exp(1j * np.arange(len(tokens))[:, None] * frequencies)

    x = p["embed_tokens"]["embedding"][tokens]
    if config.scale_embeddings:
        x = x * math.sqrt(config.hidden_size)
    for i in range(config.num_layers):
        window, turn = config.sliding_window, turns(config.rope_theta, config.rope_scaling)
        if config.sliding_layers is not None and not config.sliding_layers[i]:
            window = None
        elif config.sliding_rope_theta is not None:
            turn = turns(config.sliding_rope_theta, None)

        def rotate(x, turn=turn):  # [T, h]: pair i is the complex number x[i] + 1j x[i + h/2]
            z = (x[:, : h // 2] + 1j * x[:, h // 2 :]) * turn
            if config.rope_scaling is not None:
                z = z * config.rope_scaling.attention_factor
            return np.concatenate([z.real, z.imag], axis=-1)

        layer = p["layers"][str(i)]
        attention, mlp = layer["self_attn"], layer["mlp"]
        y = norm(x, layer["input_layernorm"]["scale"])

        def project(name, head, y=y, attention=attention):
            columns = slice(head * h, (head + 1) * h)
            out = y @ attention[name]["kernel"][:, columns]
            return out + attention[name]["bias"][columns] if config.qkv_bias else out

        mixed = []
        for head in range(config.num_heads):
            q, k = project("q_proj", head), project("k_proj", head // d)
            v = project("v_proj", head // d)
            if config.qk_norm:
                q = norm(q, attention["q_norm"]["scale"])
                k = norm(k, attention["k_norm"]["scale"])
            q, k = rotate(q), rotate(k)
            rows = []
            for t in range(len(tokens)):
                first = 0 if window is None else max(0, t + 1 - window)
                scores = k[first : t + 1] @ q[t] / math.sqrt(config.query_pre_attn_scalar or h)
                scores = cap(scores, config.attn_logit_softcapping)
                weights = np.exp(scores - scores.max())
                total = weights.sum()
                if config.attention_sinks:
                    total += np.exp(attention["sinks"][head] - scores.max())
                rows.append(weights @ v[first : t + 1] / total)
            mixed.append(np.stack(rows))
        out = np.concatenate(mixed, axis=-1) @ attention["o_proj"]["kernel"]
        if config.o_bias:
            out = out + attention["o_proj"]["bias"]
        before_mlp = "post_attention_layernorm"
        if config.post_norms:
            out = norm(out, layer["post_attention_layernorm"]["scale"])
            before_mlp = "pre_feedforward_layernorm"
        x = x + out
        y = norm(x, layer[before_mlp]["scale"])

        def gated(y, matrices):
            gate, up, down = (matrices[f"{n}_proj"]["kernel"] for n in ("gate", "up", "down"))
            biases = (matrices[f"{n}_proj"].get("bias", 0) for n in ("gate", "up", "down"))
            gate_bias, up_bias, down_bias = biases
            gate, up = y @ gate + gate_bias, y @ up + up_bias
            if config.swiglu_limit is not None:
                gate = np.minimum(gate, config.swiglu_limit)
                up = np.clip(up, -config.swiglu_limit, config.swiglu_limit) + 1
            return activation(gate) * up @ down + down_bias

        def mixture(y, mlp=mlp, gated=gated):  # [d]
            logits = y @ mlp["router"]["kernel"] + mlp["router"].get("bias", 0)
            chances = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-chances)[: config.num_experts_per_tok]
            shares = chances[chosen]
            if config.norm_topk_prob:
                shares = shares / shares.sum()
            experts = [jax.tree.map(lambda w, i=i: w[i], mlp["experts"]) for i in chosen]
            return sum(s * gated(y, expert) for s, expert in zip(shares, experts, strict=True))

        out = gated(y, mlp) if config.num_experts is None else np.stack([mixture(row) for row in y])
        x = x + (
            norm(out, layer["post_feedforward_layernorm"]["scale"]) if config.post_norms else out
        )
    x = norm(x, p["norm"]["scale"])
    table = p["embed_tokens"]["embedding"].T if config.tie_embeddings else p["lm_head"]["kernel"]
    return cap(x @ table, config.final_logit_softcapping)


# Every feature at least once, for the tests in which features could meet.
COMBINATIONS = {
    "plain": {},
    "tied, biases, Llama-3 RoPE": VARIANTS["qwen2"] | VARIANTS["llama3"],
    "alternating layers": GEMMA3 | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "norms, window, multi-query": VARIANTS["qwen3"] | VARIANTS["mistral"] | {"num_kv_heads": 1},
    "experts": VARIANTS["experts"] | {"qk_norm": True},
    "sinks": VARIANTS["gpt-oss"],
}


@pytest.fixture(params=COMBINATIONS)
def config(request, tiny_config):
    return dataclasses.replace(tiny_config, **COMBINATIONS[request.param])


def tokens_for(config, batch=2, time=9, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, (batch, time)), jnp.int32)


# float32 with 3 layers of sums of at most 28 terms, logits of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_the_float64_oracle(tiny_config, variant):
    config = dataclasses.replace(tiny_config, **VARIANTS[variant])
    params, tokens = random_params(config), tokens_for(config)
    logits = run(config, params, tokens)
    assert logits.dtype == jnp.float32
    for row in range(2):
        expected = oracle(config, params, np.asarray(tokens[row]).tolist())
        np.testing.assert_allclose(logits[row], expected, **TOLERANCE)


def test_scanned_layers_equal_unrolled_ones(config):
    params, tokens = random_params(config), tokens_for(config)
    scanned = dataclasses.replace(config, scan_layers=True, remat=True)

    def loss(model):
        return lambda params: jnp.mean(jnp.square(model.apply({"params": params}, tokens)))

    value, gradient = jax.jit(jax.value_and_grad(loss(Decoder(config))))(params)
    stacked = stack_layers(params)
    scanned_value, scanned_gradient = jax.jit(jax.value_and_grad(loss(Decoder(scanned))))(stacked)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        scanned_gradient,
        stack_layers(gradient),
    )


def test_scanned_parameters_have_the_stacked_tree(config):
    scanned = dataclasses.replace(config, scan_layers=True)
    init = Decoder(scanned).init
    shapes = jax.eval_shape(init, jax.random.key(0), tokens_for(config))["params"]
    expected = stack_layers(random_params(config))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cache_equals_no_cache(config, scan_layers):
    params, tokens = random_params(config), tokens_for(config)
    expected = run(config, params, tokens)
    config = dataclasses.replace(config, scan_layers=scan_layers)
    params = stack_layers(params) if scan_layers else params
    cache = init_cache(config, batch=2, max_length=13)
    found, start = [], 0
    for length in (4, 1, 1, 3):
        piece = tokens[:, start : start + length]
        logits, cache = run(config, params, piece, cache=cache)
        found.append(logits)
        start += length
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, **TOLERANCE)
    assert int(cache.next_slot) == 9
    assert cache.positions[0].tolist() == [*range(9), -1, -1, -1, -1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(config, side):
    params = random_params(config)
    lengths, time = (3, 7), 9
    rows = [tokens_for(config, 1, n + 2, seed=n)[0] for n in lengths]
    tokens = np.full((2, time), 5, np.int32)
    mask = np.zeros((2, time), bool)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        columns = slice(0, n) if side == "right" else slice(time - n, time)
        tokens[i, columns], mask[i, columns] = row[:n], True
    last = np.array([[np.flatnonzero(row)[-1]] for row in mask], np.int32)
    logits, cache = run(
        config,
        params,
        jnp.asarray(tokens),
        cache=init_cache(config, 2, 16),
        mask=jnp.asarray(mask),
        logits_at=jnp.asarray(last),
    )
    found = [logits]
    for step in range(2):
        following = jnp.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])
        logits, cache = run(config, params, following[:, None], cache=cache)
        found.append(logits)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        alone = run(config, params, row[None])[0]
        np.testing.assert_allclose(
            jnp.concatenate(found, axis=1)[i], alone[n - 1 : n + 2], **TOLERANCE
        )
    without_cache = run(config, params, jnp.asarray(tokens), mask=jnp.asarray(mask))
    np.testing.assert_allclose(without_cache[np.arange(2), last[:, 0]], found[0][:, 0], **TOLERANCE)
    assert bool(jnp.isfinite(without_cache).all())


@pytest.mark.parametrize("scan_layers", [False, True])
def test_chunks_equal_one_piece(config, scan_layers, monkeypatch):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    params = random_params(config)
    params = stack_layers(params) if scan_layers else params
    tokens, slots = tokens_for(config, batch=3, time=11), jnp.arange(11)
    # Chunks of 4, 4 and 3: of padding only at the start of one row and at the end of another.
    mask = jnp.stack([slots >= 0, slots >= 5, slots < 6])
    options = {"cache": init_cache(config, 3, 16), "mask": mask}
    expected, whole = run(config, params, tokens, **options)
    monkeypatch.setattr(decoder, "CHUNK", 4)
    logits, cache = run(config, params, tokens, **options)
    np.testing.assert_allclose(logits[mask], expected[mask], **TOLERANCE)
    assert cache.positions.tolist() == whole.positions.tolist()
    assert int(cache.next_slot) == 11
    at = jnp.array([[10], [10], [5]])
    logits, _ = run(config, params, tokens, logits_at=at, **options)
    np.testing.assert_allclose(logits[:, 0], expected[jnp.arange(3), at[:, 0]], **TOLERANCE)


def test_attention_in_chunks_changes_nothing(config, monkeypatch):
    params, tokens = random_params(config), tokens_for(config, batch=3, time=11)
    mask = jnp.arange(11)[None] < jnp.array([[11], [7], [2]])

    def loss(params):
        logits = Decoder(config).apply({"params": params}, tokens, mask=mask)
        return jnp.mean(jnp.square(jnp.where(mask[..., None], logits, 0))), logits

    def run(params):
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected_gradient, expected = run(params)
    monkeypatch.setattr(decoder, "CHUNK", 4)  # chunks of 4 and 4 in a loop, and of 3
    gradient, logits = run(params)
    np.testing.assert_allclose(logits[mask], expected[mask], **TOLERANCE)
    for found, leaf in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-4 * np.abs(leaf).max())


def test_attention_needs_no_memory_for_all_pairs_of_tokens(tiny_config, monkeypatch):
    monkeypatch.setattr(decoder, "CHUNK", 64)
    model, params = (
        Decoder(dataclasses.replace(tiny_config, remat=True)),
        random_params(tiny_config),
    )

    def loss(params, tokens):
        return jnp.mean(jnp.square(model.apply({"params": params}, tokens)))

    def temporaries(time: int) -> int:
        lowered = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((1, time), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    scores = 4 * tiny_config.num_heads * 2048**2
    assert temporaries(2048) < scores / 2


@pytest.mark.parametrize(
    ("change", "slots"),
    [
        ({}, [16, 16]),
        ({"sliding_window": 3}, [3, 3]),
        ({"sliding_window": 3, "sliding_layers": (True, False)}, [3, 16]),
        ({"sliding_window": 3, "sliding_layers": (False, False)}, [16, 16]),
        ({"sliding_window": 15}, [15, 15]),
        ({"sliding_window": 17}, [16, 16]),
    ],
)
def test_windowed_layers_have_a_slot_for_each_token_of_the_window(tiny_config, change, slots):
    config = dataclasses.replace(tiny_config, **change)
    cache = init_cache(config, batch=3, max_length=16)
    shapes = [(3 * 2, n, 6) for n in slots]
    assert [layer.keys.shape for layer in cache.layers] == shapes
    assert [layer.values.shape for layer in cache.layers] == shapes
    assert cache.positions.shape == (3, 16)
    scanned = init_cache(dataclasses.replace(config, scan_layers=True), batch=3, max_length=16)
    assert scanned.layers.keys.shape == (2, 3 * 2, max(slots), 6)  # one shape for all


def test_no_slot_of_a_ring_is_written_twice(tiny_config):
    """Which of two writes to a slot counts is not defined."""
    cache = init_cache(dataclasses.replace(tiny_config, sliding_window=3), 2, 16)
    cache = cache.advance(jnp.array([[0, 1], [-1, 0]]))
    new = jnp.array([[2, 3, 4, 5, 6], [-1, 1, -1, 2, -1]])
    positions = jnp.array([[2, 3, 4, 5, 6], [0, 1, 1, 2, 2]])
    stored, slots = cache.advance(new).place(positions, new, 3)
    assert slots.tolist() == [[3, 3, 1, 2, 0], [3, 1, 3, 2, 3]]  # 3 is none
    assert jnp.maximum(stored, -1).tolist() == [
        [0, 1, -1, 2, 3, 4, 5, 6],
        [0, -1, -1, -1, 1, -1, 2, -1],
    ]


RINGS = {name: change for name, change in COMBINATIONS.items() if "sliding_window" in change}


def ring_model(tiny_config, name, window, scan_layers):
    """A decoder with windows, its parameters, and the same without scanned layers."""
    unrolled = dataclasses.replace(tiny_config, **RINGS[name] | {"sliding_window": window})
    params = random_params(unrolled)
    config = dataclasses.replace(unrolled, scan_layers=scan_layers)
    return config, stack_layers(params) if scan_layers else params, unrolled, params


def read_in_pieces(config, params, tokens, mask, lengths):
    """The logits of tokens that are read a piece at a time, and the cache."""
    cache = init_cache(config, len(tokens), tokens.shape[1] + 2)
    shapes = jax.tree.map(jnp.shape, cache)
    apply = jax.jit(Decoder(config).apply)
    found, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        arguments = {"cache": cache, "mask": mask[:, piece]}
        logits, cache = apply({"params": params}, tokens[:, piece], **arguments)
        found.append(logits)
        start += length
    assert start == tokens.shape[1]
    assert jax.tree.map(jnp.shape, cache) == shapes
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize(("window", "scan_layers"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", RINGS)
def test_rings_equal_no_cache(tiny_config, name, window, scan_layers):
    config, params, *unrolled = ring_model(tiny_config, name, window, scan_layers)
    tokens = tokens_for(config, time=18)
    expected = run(*unrolled, tokens)
    lengths = (4, 1, 1, 3, 1, 5, 1, 1, 1)
    found, _ = read_in_pieces(config, params, tokens, tokens >= 0, lengths)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


# Columns of real tokens in each row: all; padding on the left, and longer than the ring on the
# right; with gaps that are whole pieces; first nothing at all, then single tokens among padding.
RAGGED = [range(22), range(6, 22), [0, 1, *range(8, 22)], [*range(8), *range(13, 22)]]
RAGGED.append([8, 9, 11, 13, 15, 18, 19, 21])


@pytest.mark.parametrize(
    ("lengths", "chunk", "scan_layers"),
    [((8, 1, 4, 1, 1, 6, 1), 512, False), ((20, 1, 1), 4, True)],
)
@pytest.mark.parametrize("name", RINGS)
def test_padding_is_not_written_to_rings(
    tiny_config, name, lengths, chunk, scan_layers, monkeypatch
):
    config, params, *unrolled = ring_model(tiny_config, name, 3, scan_layers)
    tokens = np.asarray(tokens_for(config, len(RAGGED), 22))
    mask = np.array([np.isin(np.arange(22), columns) for columns in RAGGED])
    # What follows a token does not change its logits, so rows without gaps need no mask.
    closed = np.zeros_like(tokens)
    for row, columns in enumerate(RAGGED):
        closed[row, : len(columns)] = tokens[row, list(columns)]
    expected = run(*unrolled, jnp.asarray(closed))
    monkeypatch.setattr(decoder, "CHUNK", chunk)
    tokens, real = jnp.asarray(tokens), jnp.asarray(mask)
    found, cache = read_in_pieces(config, params, tokens, real, lengths)
    for row, columns in enumerate(RAGGED):
        np.testing.assert_allclose(
            found[row, np.array(columns)], expected[row, : len(columns)], **TOLERANCE
        )
    assert bool(jnp.isfinite(found).all())
    assert cache.last[:, 0].tolist() == [len(columns) - 1 for columns in RAGGED]


def test_logits_at_selects(tiny_config):
    params, tokens = random_params(tiny_config), tokens_for(tiny_config)
    everything = run(tiny_config, params, tokens)
    some = run(tiny_config, params, tokens, logits_at=jnp.array([[0, 8], [4, 4]]))
    expected = [[everything[0, 0], everything[0, 8]], [everything[1, 4], everything[1, 4]]]
    np.testing.assert_allclose(some, np.array(expected), rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_give_float32_logits(tiny_config):
    params, tokens = random_params(tiny_config), tokens_for(tiny_config)
    expected = run(tiny_config, params, tokens)
    half = dataclasses.replace(tiny_config, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = run(half, params, tokens)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; errors of single products add up over three layers.
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < float(error) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded_to_bfloat16(tiny_config, tied):
    config = dataclasses.replace(tiny_config, dtype=jnp.bfloat16, tie_embeddings=tied)
    logits = run(config, random_params(config), tokens_for(config))
    rounded = logits == logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert float(jnp.mean(rounded)) < 0.1


def test_the_scale_of_embeddings_is_rounded_first(tiny_config):
    config = dataclasses.replace(tiny_config, scale_embeddings=True, dtype=jnp.bfloat16)
    x = embed(config, jnp.full((1, 1, 20), 1.625))
    assert x.dtype == jnp.bfloat16
    # sqrt(20) is 4.4721, in bfloat16 4.46875; rounded last, the product would be 7.28125.
    assert float(x[0, 0, 0]) == 7.25


def test_each_weight_is_used_in_one_product(tiny_config):
    """Compressed execution relies on it: one dot_general a matrix, and gathers for embeddings."""
    for tied in (False, True):
        config = dataclasses.replace(tiny_config, tie_embeddings=tied, qkv_bias=True)
        params = random_params(config)

        def apply(params, config=config):
            return Decoder(config).apply({"params": params}, tokens_for(config))

        jaxpr = jax.make_jaxpr(apply)(params).jaxpr
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        uses: dict[str, list[str]] = {path: [] for path in paths}
        _count_uses(jaxpr, dict(zip(jaxpr.invars, paths, strict=True)), uses)
        for path, primitives in uses.items():
            if path.endswith("/kernel"):
                assert primitives == ["dot_general"], path
        expected = ["gather", "dot_general"] if tied else ["gather"]
        assert uses["embed_tokens/embedding"] == expected


def _count_uses(jaxpr, names, uses):
    for equation in jaxpr.eqns:
        operands = [names.get(v) if not hasattr(v, "val") else None for v in equation.invars]
        inner = equation.params.get("jaxpr")
        if inner is not None and any(operands):
            inner = getattr(inner, "jaxpr", inner)
            pairs = zip(inner.invars, operands, strict=True)
            _count_uses(inner, {v: name for v, name in pairs if name}, uses)
            continue
        for name in filter(None, operands):
            uses[name].append(equation.primitive.name)


def test_decode_step_copies_no_cache(tiny_config):
    """With a donated cache, XLA's temporaries do not grow with the cache."""
    params = random_params(tiny_config)

    def step(params, tokens, cache):
        return Decoder(tiny_config).apply({"params": params}, tokens, cache=cache)

    def temporaries(slots: int) -> int:
        cache = init_cache(tiny_config, 1, slots)
        lowered = jax.jit(step, donate_argnums=2).lower(params, jnp.zeros((1, 1), jnp.int32), cache)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_layer = 2 * tiny_config.num_kv_heads * tiny_config.head_dim * 4
    # A few float32 scores a slot for each query head, and the mask; no keys and values.
    growth = (temporaries(4096) - temporaries(1024)) / 3072
    assert growth < 8 * tiny_config.num_heads + 8 < one_layer


@pytest.mark.parametrize("batch", [1, 2])
def test_decode_step_copies_no_ring(tiny_config, batch):
    params = random_params(tiny_config)

    def temporaries(window: int) -> int:
        config = dataclasses.replace(tiny_config, sliding_window=window)
        cache = init_cache(config, batch, 8192)
        assert cache.layers[0].keys.shape[1] == window
        tokens = jnp.zeros((batch, 1), jnp.int32)
        step = jax.jit(
            lambda params, cache: Decoder(config).apply({"params": params}, tokens, cache=cache),
            donate_argnums=1,
        )
        return step.lower(params, cache).compile().memory_analysis().temp_size_in_bytes

    keys = batch * tiny_config.num_kv_heads * tiny_config.head_dim * 4
    growth = (temporaries(4096) - temporaries(1024)) / 3072
    assert growth < batch * (8 * tiny_config.num_heads + 8) < keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 3.5}, r"vocab_size=3.5"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"rope_scaling": RopeScaling("factors", factors=(1.0,))}, "1 factors; head_dim=6 needs 3"),
        ({"activation": "gelu"}, "activation='gelu' must be one of silu, gelu_tanh, gelu_sigmoid"),
        ({"swiglu_limit": -1.0}, "swiglu_limit=-1.0 must be positive"),
        ({"head_dim": 2, "rope_scaling": RopeScaling("yarn", 4.0)}, "YaRN needs several"),
        ({"expert_bias": True}, "expert_bias needs num_experts"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 must be positive"),
        ({"sliding_layers": (True,), "sliding_window": 3}, "1 entries; num_layers=2 needs as many"),
        ({"sliding_layers": (True, False)}, "sliding_layers needs a sliding_window"),
        ({"sliding_rope_theta": 1e4}, "sliding_rope_theta needs a sliding_window"),
    ],
)
def test_config_refuses(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **change)
