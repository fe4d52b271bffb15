"""Plans, their application, the greedy search, phases and measurement."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.arrays import GatedArray, RowLutArray
from lutjax.calibrate import activation_quantiles
from lutjax.models import Decoder, decoder, generate, init_cache
from lutjax.models.blockwise import decoder_blocks
from lutjax.sparsity import (
    Gate,
    GreedySearch,
    PhasedParams,
    SparsityPlan,
    greedy_search,
    measure_sparsity,
    phased,
    plan_greedy,
    plan_thresholds,
    plan_uniform,
    recalibrate,
    sparsify,
)

TOKENS = jnp.arange(48, dtype=jnp.int32).reshape(2, 24) % 37


@dataclasses.dataclass(frozen=True)
class Setting:
    model: Decoder
    params: dict

    def run(self, params, tokens):
        return self.model.apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def setting():
    from lutjax.models import DecoderConfig

    config = DecoderConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_position_embeddings=128,
    )
    model = Decoder(config)
    params = model.init(jax.random.key(0), TOKENS)["params"]
    # A token a number would give every block the same input; make activations differ in size.
    scale = jnp.exp(jax.random.normal(jax.random.key(1), (24,)))
    for layer in params["layers"].values():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[norm]["scale"] = scale
    return Setting(model, params)


@pytest.fixture(scope="module")
def quantiles(setting):
    return activation_quantiles(setting.run, setting.params, [TOKENS])


@pytest.fixture(scope="module")
def search(setting, quantiles):
    fns, blocks, x = decoder_blocks(setting.model.config, setting.params, TOKENS)
    return greedy_search(fns, blocks, x, quantiles, limit=0.5, step=0.05)


@pytest.mark.parametrize("compressed", [False, True])
def test_uniform_reaches_its_target(setting, quantiles, compressed):
    params = setting.params
    if compressed:
        params = lutjax.quantize(params, bits=8, group_size=16)
    plan = plan_uniform(setting.params, quantiles, 0.4)
    gated = sparsify(params, plan)
    assert all(
        isinstance(leaf, GatedArray)
        for leaf in jax.tree.leaves(gated["layers"], is_leaf=lutjax.is_compressed)
        if leaf.ndim == 2
    )
    logits = jax.jit(lutjax.lift(setting.run, strict=True))(gated, TOKENS)
    assert not np.allclose(logits, setting.run(setting.params, TOKENS), atol=1e-3)
    achieved = measure_sparsity(setting.run, gated, [TOKENS])
    # later inputs shift once earlier ones are masked
    assert achieved.overall == pytest.approx(0.4, abs=0.03)
    first = achieved.shares["layers/0/self_attn/q_proj/kernel"]
    assert first == pytest.approx(0.4, abs=0.002 if not compressed else 0.02)
    assert "all gated weights" in str(achieved)


def test_recalibration_reaches_the_target(setting, quantiles):
    first = plan_uniform(setting.params, quantiles, 0.5)
    again = recalibrate(setting.run, setting.params, first, [TOKENS])
    errors = [
        abs(measure_sparsity(setting.run, sparsify(setting.params, p), [TOKENS]).overall - 0.5)
        for p in (first, again)
    ]
    assert errors[1] < 0.005
    unknown = plan_thresholds(setting.params, {"layers/0/mlp/up_proj/kernel": 0.1})
    with pytest.raises(ValueError, match="no sparsities to keep"):
        recalibrate(setting.run, setting.params, unknown, [TOKENS])


def test_no_sparsity_is_exact(setting, quantiles):
    gated = sparsify(setting.params, plan_uniform(setting.params, quantiles, 0.0))
    logits = lutjax.lift(setting.run)(gated, TOKENS)
    np.testing.assert_allclose(logits, setting.run(setting.params, TOKENS), rtol=1e-5, atol=1e-5)


def test_prefill_and_decode_share_every_buffer(setting, quantiles):
    gated = sparsify(setting.params, plan_uniform(setting.params, quantiles, 0.5))
    plain = setting.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    inner = gated["layers"]["0"]["mlp"]["up_proj"]["kernel"].base.matrix
    assert inner.unsafe_buffer_pointer() == plain.unsafe_buffer_pointer()


def test_wina_gates_on_weighted_magnitudes(setting):
    found = activation_quantiles(setting.run, setting.params, [TOKENS], score="wina")
    plan = plan_uniform(setting.params, found, 0.5)
    assert plan.method == "wina" and "norm" in str(plan)
    gated = sparsify(setting.params, plan)
    kernel = gated["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(
        kernel.row_norms,
        np.linalg.norm(setting.params["layers"]["0"]["mlp"]["up_proj"]["kernel"], axis=1),
        rtol=1e-5,
    )
    assert measure_sparsity(setting.run, gated, [TOKENS]).overall == pytest.approx(0.5, abs=0.04)
    # at equal sparsity of the first product, WINA's error is smaller
    x = jax.random.normal(jax.random.key(3), (200, 24))
    w = jax.random.normal(jax.random.key(4), (24, 16)) * jnp.linspace(0.1, 3.0, 24)[:, None]
    norms = jnp.linalg.norm(w, axis=1)
    errors = {}
    for name, scale in (("magnitude", jnp.ones(24)), ("wina", norms)):
        threshold = float(jnp.median(jnp.abs(x) * scale[None]))
        array = GatedArray.of(lutjax.arrays.DenseArray.of(w), threshold, scale)
        errors[name] = float(jnp.linalg.norm(array.matmul(x) - x @ w))
    assert errors["wina"] < errors["magnitude"]


def relative_error(setting, plan, fn, x, y):
    """Of the first block's output: each token by its own size, root mean square."""
    found = lutjax.lift(fn)(sparsify(setting.params, plan)["layers"]["0"], x)
    of_tokens = jnp.linalg.norm(found - y, axis=-1) / jnp.linalg.norm(y, axis=-1)
    return float(jnp.sqrt(jnp.mean(of_tokens**2)))


def test_greedy_search_records_a_path_that_beats_uniform(setting, quantiles, search):
    for path, block in search.blocks.items():
        assert sum(block.shares.values()) == pytest.approx(1)
        # grouped-query attention: k is half of q here
        shares = block.shares
        assert shares["self_attn/k_proj/kernel"] == pytest.approx(
            shares["self_attn/q_proj/kernel"] / 2
        )
        assert len(block.raised) == len(block.errors) == 10
        levels = search.sparsities(0.5)
        total = sum(levels[f"{path}/{name}"] * share for name, share in shares.items())
        assert total == pytest.approx(0.5)
        part = search.sparsities(0.27)
        assert sum(part[f"{path}/{n}"] * s for n, s in shares.items()) == pytest.approx(0.27)
        assert all(part[f"{path}/{n}"] <= levels[f"{path}/{n}"] + 1e-9 for n in shares)
    fns, blocks, x = decoder_blocks(setting.model.config, setting.params, TOKENS)
    fn = fns["layers/0"]
    plans = {
        "greedy": plan_greedy(setting.params, quantiles, search, 0.5),
        "uniform": plan_uniform(setting.params, quantiles, 0.5),
    }
    y = fn(blocks["layers/0"], x)
    errors = {name: relative_error(setting, plan, fn, x, y) for name, plan in plans.items()}
    assert errors["greedy"] < errors["uniform"]
    assert errors["greedy"] == pytest.approx(search.blocks["layers/0"].errors[-1], rel=1e-3)
    assert plans["greedy"].sparsity == pytest.approx(0.5, abs=0.01)


def test_lazy_steps_are_those_of_an_exhaustive_search(setting, quantiles, search):
    """Each step of the recorded path against all raises at that point."""
    fns, blocks, x = decoder_blocks(setting.model.config, setting.params, TOKENS)
    fn = fns["layers/0"]
    y = fn(blocks["layers/0"], x)
    block = search.blocks["layers/0"]
    levels = dict.fromkeys(block.shares, 0.0)
    for raised, error in zip(block.raised[:4], block.errors[:4], strict=True):
        found = {}
        for name, share in block.shares.items():
            tried = {**levels, name: levels[name] + search.step / share}
            path = {
                f"layers/0/{n}": quantiles[f"layers/0/{n}"].quantile(v)
                for n, v in tried.items()
                if v
            }
            found[name] = relative_error(setting, plan_thresholds(setting.params, path), fn, x, y)
        assert min(found, key=found.__getitem__) == raised
        assert found[raised] == pytest.approx(error, rel=1e-4)
        levels[raised] += search.step / block.shares[raised]


def test_tokens_without_an_output_count_for_nothing():
    rng = np.random.default_rng(0)
    block = {n: jnp.asarray(rng.normal(size=(32, 32)), jnp.float32) for n in ("a", "b")}
    x = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)

    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    found = activation_quantiles(lambda p, x: fn(p["0"], x), {"0": block}, [x])
    with_zeros = jnp.concatenate([x, jnp.zeros((4, 32))])
    plain, same = (
        greedy_search(fn, {"0": block}, rows, found, limit=0.3, step=0.1).blocks["0"]
        for rows in (x, with_zeros)
    )
    assert plain.raised == same.raised
    np.testing.assert_allclose(plain.errors, same.errors, rtol=1e-4)


def test_greedy_search_goes_on_from_its_file(setting, quantiles, search, tmp_path):
    fns, blocks, x = decoder_blocks(setting.model.config, setting.params, TOKENS)
    file = tmp_path / "search.json"
    search.save(file)
    half = GreedySearch.load(file)
    assert half == search
    first = {"layers/0": half.blocks["layers/0"]}
    dataclasses.replace(half, blocks=first).save(file)
    again = greedy_search(fns, blocks, x, quantiles, limit=0.5, step=0.05, cache=file)
    assert again == search == GreedySearch.load(file)
    with pytest.raises(ValueError, match=r"made with step=0.05"):
        greedy_search(fns, blocks, x, quantiles, limit=0.5, step=0.1, cache=file)
    for other in (
        (blocks, 2 * x, quantiles),
        (blocks, x, quantiles + quantiles),
        (jax.tree.map(lambda w: 2 * w, blocks), x, quantiles),
    ):
        with pytest.raises(ValueError, match=r"search\.json was made for other parameters"):
            greedy_search(fns, *other, limit=0.5, step=0.05, cache=file)
    with pytest.raises(ValueError, match=r"target=0.7 is beyond the search of 'layers/0'"):
        search.sparsities(0.7)
    with pytest.raises(ValueError, match="limit=1"):
        greedy_search(fns, blocks, x, quantiles, limit=1)
    with pytest.raises(ValueError, match="no quantiles for 'layers/2/"):
        greedy_search(fns, {"layers/2": blocks["layers/0"]}, x, quantiles, limit=0.1)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"search\.json is no greedy search"):
        greedy_search(fns, blocks, x, quantiles, limit=0.5, cache=file)


def test_plan_saves_prints_and_plots(setting, quantiles, tmp_path):
    plan = plan_uniform(setting.params, quantiles, 0.5)
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan
    assert "uniform, target 50.0 %, expected 50" in str(plan)
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    depth = plan.over_depth()
    assert [block for block, _ in depth["layers/*/mlp/up_proj/kernel"]] == [0, 1]
    stacked = SparsityPlan("x", None, {"layers/w": Gate((0.1, 0.2), (0.3, 0.4), (2, 8, 8))})
    stacked.save(tmp_path / "stacked.json")
    assert SparsityPlan.load(tmp_path / "stacked.json") == stacked
    assert stacked.over_depth() == {"layers/w": [(0, 0.3), (1, 0.4)]}


def test_phases(setting, quantiles):
    config = setting.model.config
    gated = sparsify(setting.params, plan_uniform(setting.params, quantiles, 0.5))
    apply_fn = lutjax.lift(setting.model.apply)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    run = lambda fn, params: generate(fn, params, prompts, config=config, max_new_tokens=4)  # noqa: E731
    # with the same parameters in both phases, where the prompt is split changes nothing
    same = PhasedParams(setting.params, setting.params)
    split = phased(setting.model.apply, 0.25)
    assert run(split, same) == run(setting.model.apply, setting.params)
    # by hand: the prompt dense, then one token sparse
    both = PhasedParams(setting.params, gated)
    fn = jax.jit(phased(apply_fn))
    plain, cache = jax.jit(setting.model.apply)(
        {"params": setting.params}, TOKENS, cache=init_cache(config, 2, 64)
    )
    expected, _ = jax.jit(apply_fn)({"params": gated}, TOKENS[:, :1], cache=cache)
    logits, cache = fn({"params": both}, TOKENS, cache=init_cache(config, 2, 64))
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)
    actual, _ = fn({"params": both}, TOKENS[:, :1], cache=cache)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs a cache"):
        phased(apply_fn, 0.5)({"params": both}, TOKENS)
    with pytest.raises(ValueError, match="dense_prefill=2"):
        phased(apply_fn, 2)


def test_phases_split_a_prompt_in_chunks_where_they_split_it_whole(setting, monkeypatch):
    halved = jax.tree.map(lambda leaf: leaf / 2, setting.params)
    both = PhasedParams(setting.params, halved)
    cache = init_cache(setting.model.config, 2, TOKENS.shape[1])

    def logits():
        fn = phased(setting.model.apply, 0.5)
        return jax.jit(fn)({"params": both}, TOKENS, cache=cache)[0]

    whole = logits()
    monkeypatch.setattr(decoder, "CHUNK", 5)
    np.testing.assert_allclose(logits(), whole, rtol=1e-4, atol=1e-4)


def test_prepacked_rows_are_the_same_program(setting, quantiles):
    compressed = lutjax.quantize(setting.params, bits=4, group_size=16)
    gated = sparsify(compressed, plan_uniform(setting.params, quantiles, 0.5))
    packed = lutjax.prepack(gated, implementation="mosaic_gpu")
    kernel = packed["layers"]["1"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(kernel.base, RowLutArray)
    run = jax.jit(lutjax.lift(setting.run, strict=True))
    token = TOKENS[:1, :1]
    np.testing.assert_allclose(run(packed, token), run(gated, token), rtol=1e-4, atol=1e-4)


def test_batches_do_not_disturb_each_other(setting, quantiles):
    """With several sequences a row that one of them needs is read; the others still mask it."""
    gated = sparsify(setting.params, plan_uniform(setting.params, quantiles, 0.5))
    run = jax.jit(lutjax.lift(setting.run))
    together = run(gated, TOKENS[:, :1])
    for i in range(2):
        alone = run(gated, TOKENS[i : i + 1, :1])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_bad_input(setting, quantiles, search):
    params = setting.params
    for target in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            plan_uniform(params, quantiles, target)
    with pytest.raises(ValueError, match=r"up_porj/kernel' is no projection.*up_proj/kernel"):
        plan_thresholds(params, {"layers/0/mlp/up_porj/kernel": 0.1})
    path = "layers/0/mlp/up_proj/kernel"
    with pytest.raises(ValueError, match=f"threshold -1.0 of '{path}'"):
        plan_thresholds(params, {path: -1.0})
    other = SparsityPlan("x", None, {path: Gate(0.1, None, (99, 40))})
    with pytest.raises(ValueError, match=r"shape \(99, 40\).*\(24, 40\).*another model"):
        sparsify(params, other)
    with pytest.raises(ValueError, match=r"the plan names 'nope'.*0 more"):
        sparsify(params, SparsityPlan("x", None, {"nope": Gate(0.1, None, (2, 2))}))
    plan = plan_thresholds(params, {path: 0.1}, quantiles)
    assert plan.gates[path].sparsity > 0
    del (others := dict(quantiles.histograms))[path]
    others = dataclasses.replace(quantiles, histograms=others)
    for make in (
        lambda: plan_thresholds(params, {path: 0.1}, others),
        lambda: plan_greedy(params, others, search, 0.5),
    ):
        with pytest.raises(ValueError, match=f"no quantiles for '{path}'"):
            make()
    with pytest.raises(ValueError, match=rf"'{path}': threshold of shape \(2,\) does not fit"):
        sparsify(params, plan_thresholds(params, {path: (0.1, 0.2)}))
    with pytest.raises(ValueError, match="has a gate already"):
        sparsify(sparsify(params, plan), plan)
    with pytest.raises(ValueError, match="no parameter has a gate"):
        measure_sparsity(setting.run, params, [TOKENS])
    for text in ("{}", "[]", "no json", '{"format": "lutjax sparsity plan 1"}'):
        with pytest.raises(ValueError, match="not a sparsity plan"):
            SparsityPlan.from_json(text)
