"""Many adapters in one batch against one adapter at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.adapters import lora, multi
from lutjax.arrays import LowRankArray
from lutjax.models import Decoder, DecoderConfig, generate, init_cache, stack_layers

CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)


def make(scan_layers: bool = False, window: int | None = None):
    model = Decoder(dataclasses.replace(CONFIG, scan_layers=scan_layers, sliding_window=window))
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    base = lutjax.quantize(params, bits=4, group_size=16)
    adapters = []
    for number in range(3):
        adapter = lora.init(base, 2, jax.random.key(number))
        adapters.append({p: with_right(part, number) for p, part in adapter.items()})
    if scan_layers:
        trees = [stack_layers(lora.attach(base, adapter)) for adapter in adapters]
        base = lora.detach(trees[0])[0]
        adapters = [lora.detach(tree)[1] for tree in trees]
    return model, base, adapters


def with_right(part: LowRankArray, seed: int) -> LowRankArray:
    rng = np.random.default_rng((seed, *part.shape))
    right = jnp.asarray(rng.normal(size=part.right.shape), jnp.float32)
    return dataclasses.replace(part, right=right)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_logits_and_cache_are_those_of_one_adapter_at_a_time(scan_layers, window):
    model, base, adapters = make(scan_layers, window)
    apply_fn = jax.jit(lutjax.lift(model.apply))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 37, (6, 5)), jnp.int32)
    mask = jnp.asarray(rng.random((6, 5)) < 0.8).at[:, 0].set(True)
    last = jnp.full((6, 1), 4, jnp.int32)
    cache = init_cache(model.config, 6, 8)
    params = (base, multi.batch(adapters))
    logits, after = multi.multi_lora(apply_fn)(
        {"params": params}, tokens, cache=cache, mask=mask, logits_at=last
    )
    whole = multi.multi_lora(apply_fn)({"params": params}, tokens)
    for number, adapter in enumerate(adapters):
        rows = slice(2 * number, 2 * number + 2)
        own = {"params": lora.attach(base, adapter)}
        expected, expected_cache = apply_fn(
            own,
            tokens[rows],
            cache=init_cache(model.config, 2, 8),
            mask=mask[rows],
            logits_at=last[rows],
        )
        # float32; the order of sums differs
        np.testing.assert_allclose(logits[rows], expected, atol=2e-5)
        np.testing.assert_allclose(whole[rows], apply_fn(own, tokens[rows]), atol=2e-5)
        np.testing.assert_array_equal(after.positions[rows], expected_cache.positions)
        sequences = slice(4 * number, 4 * number + 4)  # two heads each
        for found, wanted in zip(
            jax.tree.leaves(after.layers), jax.tree.leaves(expected_cache.layers), strict=True
        ):
            part = found[:, sequences] if scan_layers else found[sequences]
            np.testing.assert_allclose(part, wanted, atol=2e-5)
    assert int(after.next_slot) == 5


@pytest.mark.parametrize("window", [None, 3])
def test_generation_is_that_of_each_adapter(window):
    model, base, adapters = make(window=window)
    apply_fn = lutjax.lift(model.apply)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11], [12, 13]]
    run = functools.partial(generate, config=model.config, max_new_tokens=6)
    found = run(multi.multi_lora(apply_fn), (base, multi.batch(adapters)), prompts)
    expected = [
        tokens
        for number, adapter in enumerate(adapters)
        for tokens in run(
            apply_fn, lora.attach(base, adapter), prompts[2 * number : 2 * number + 2]
        )
    ]
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) > 3  # the adapters matter


def test_the_base_is_multiplied_once_for_all():
    """Products with packed weights see all rows; a batch of weights would be a loop on CPUs."""
    model, base, adapters = make()
    apply_fn = multi.multi_lora(lutjax.lift(model.apply))
    tokens = jnp.zeros((6, 5), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params: apply_fn({"params": params}, tokens))(
        (base, multi.batch(adapters))
    )
    rows = [
        eqn.invars[0].aval.shape
        for eqn in equations(jaxpr.jaxpr)
        if any(getattr(v.aval, "dtype", None) == jnp.uint8 for v in eqn.invars)
        and eqn.invars[0].aval.dtype == jnp.float32
        and eqn.primitive.name in ("jit", "pjit")
    ]
    assert len(rows) == 14  # seven matrices in each of two blocks
    assert {shape[0] for shape in rows} == {30}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name in ("jit", "pjit") and not any(
            getattr(v.aval, "dtype", None) == jnp.uint8 for v in eqn.invars
        ):
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from equations(inner)


def test_bad_input():
    _, base, adapters = make()
    with pytest.raises(ValueError, match="adapters is empty"):
        multi.batch([])
    other = lora.init(base, 3, jax.random.key(0))
    with pytest.raises(ValueError, match=r"rank=2.* in adapter 0 and .*rank=3.* in adapter 1"):
        multi.batch([adapters[0], other])
    fewer = {p: part for p, part in adapters[1].items() if "q_proj" not in p}
    with pytest.raises(ValueError, match=r"not of the same weights: \['layers/0/.*q_proj"):
        multi.batch([adapters[0], fewer])
    apply_fn = multi.multi_lora(lambda *_, **__: None)
    batched = multi.batch(adapters)
    with pytest.raises(ValueError, match="4 sequences cannot be shared among 3 adapters"):
        apply_fn({"params": (base, batched)}, jnp.zeros((4, 1), jnp.int32))
    with pytest.raises(ValueError, match="adapters are not stacked"):
        apply_fn({"params": (base, adapters[0])}, jnp.zeros((4, 1), jnp.int32))
