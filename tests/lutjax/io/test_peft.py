"""PEFT adapters in and out, against PEFT's formula in numpy and, if installed, PEFT itself."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lutjax import lift, quantize
from lutjax.adapters import lora
from lutjax.arrays import DenseArray, LowRankArray, ProductArray, SumArray, is_compressed
from lutjax.io import (
    load_peft,
    load_peft_head,
    open_compressed,
    read_params,
    save,
    save_peft,
)
from lutjax.io.checkpoint import nest
from lutjax.models import Decoder
from tests.lutjax.tiny_checkpoint import TINY, assert_same_bits, dense_params, write_hf

CONFIG = dataclasses.replace(TINY, vocab_size=39)
Q, DOWN = "layers/1/self_attn/q_proj/kernel", "layers/0/mlp/down_proj/kernel"


def random_adapter(ranks: dict[str, int], seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {path: value.shape for path, value in dense_params(CONFIG).items()}
    return {
        path: LowRankArray.of(
            jnp.asarray(rng.normal(size=(shapes[path][0], rank)) * 0.1, dtype),
            jnp.asarray(rng.normal(size=(rank, shapes[path][1])) * 0.1, dtype),
        )
        for path, rank in ranks.items()
    }


def every_kernel(rank: int) -> dict[str, int]:
    return {path: rank for path in dense_params(CONFIG) if path.endswith("_proj/kernel")}


def peft_delta(directory, module: str) -> np.ndarray:
    """B A times the scale, [out, in], in float64, by PEFT's documentation."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{f}.weight"].astype(np.float64) for f in "AB")
    rank = a.shape[0]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    return scale * (b @ a)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 32.0])
def test_written_factors_are_the_change_by_pefts_formula(tmp_path, alpha, rslora):
    adapter = random_adapter({Q: 4, DOWN: 3})
    save_peft(tmp_path / "a", adapter, base_model="some/model", alpha=alpha, rslora=rslora)
    modules = {Q: "model.layers.1.self_attn.q_proj", DOWN: "model.layers.0.mlp.down_proj"}
    for path, module in modules.items():
        left, right = (np.asarray(f, np.float64) for f in (adapter[path].left, adapter[path].right))
        # float32 roundings of right / scale only.
        np.testing.assert_allclose(
            peft_delta(tmp_path / "a", module), (left @ right).T, rtol=1e-5, atol=1e-7
        )
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert config["r"] == 4
    assert config["rank_pattern"] == {r"layers\.0\.mlp\.down_proj": 3}


@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip(tmp_path, rslora):
    adapter = random_adapter({Q: 4, DOWN: 3})
    save_peft(tmp_path / "a", adapter, alpha=16.0, rslora=rslora)
    found = load_peft(tmp_path / "a")
    assert set(found) == set(adapter)
    for path, part in adapter.items():
        np.testing.assert_array_equal(found[path].left, part.left)
        # right is divided by the scale and multiplied by it again: two float32 roundings.
        np.testing.assert_allclose(found[path].right, part.right, rtol=3e-7)


def test_bfloat16_factors_stay_bfloat16(tmp_path):
    adapter = random_adapter({Q: 4}, dtype=jnp.bfloat16)
    save_peft(tmp_path / "a", adapter)
    found = load_peft(tmp_path / "a")[Q]
    assert found.left.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.right, adapter[Q].right)  # the scale is 1 by default
    assert load_peft(tmp_path / "a", dtype=jnp.float32)[Q].left.dtype == jnp.float32


def test_the_head_of_a_classifier(tmp_path):
    adapter, head = random_adapter({Q: 4}), jnp.arange(96, dtype=jnp.float32).reshape(32, 3)
    save_peft(tmp_path / "a", adapter, head=head)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    tensors = safetensors.numpy.load_file(tmp_path / "a/adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], head.T)
    np.testing.assert_array_equal(load_peft_head(tmp_path / "a"), head)
    assert set(load_peft(tmp_path / "a")) == {Q}
    path = tmp_path / "a/adapter_config.json"
    config["modules_to_save"] = ["score", "classifier", "score"]  # as PEFT saves it again
    path.write_text(json.dumps(config))
    assert set(load_peft(tmp_path / "a")) == {Q}
    np.testing.assert_array_equal(load_peft_head(tmp_path / "a"), head)
    save_peft(tmp_path / "b", adapter)
    with pytest.raises(ValueError, match="no adapter of a classifier"):
        load_peft_head(tmp_path / "b")


def test_patterns_written_by_peft_are_obeyed(tmp_path):
    save_peft(tmp_path / "a", random_adapter({Q: 4, DOWN: 4}), alpha=4.0)
    path = tmp_path / "a/adapter_config.json"
    config = json.loads(path.read_text()) | {
        "alpha_pattern": {"mlp.down_proj": 12},
        "init_lora_weights": "gaussian",  # which leaves the base as it is
    }
    path.write_text(json.dumps(config))
    before, found = random_adapter({Q: 4, DOWN: 4}), load_peft(tmp_path / "a")
    np.testing.assert_allclose(found[Q].right, before[Q].right, rtol=3e-7)
    np.testing.assert_allclose(found[DOWN].right, 3 * before[DOWN].right, rtol=3e-7)


def test_stacked_layers_are_refused(tmp_path):
    part = LowRankArray.of(jnp.ones((2, 32, 2)), jnp.ones((2, 2, 32)))
    with pytest.raises(ValueError, match="unstack_layers"):
        save_peft(tmp_path / "a", {"layers/self_attn/q_proj/kernel": part})
    with pytest.raises(ValueError, match="nothing to save"):
        save_peft(tmp_path / "a", {})
    with pytest.raises(ValueError, match="alpha=0"):
        save_peft(tmp_path / "a", random_adapter({Q: 2}), alpha=0)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not plain LoRA"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication=.* is not plain LoRA"),
        ({"use_qalora": True}, "use_qalora=True is not plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes the base"),
        ({"peft_type": "LOHA"}, "only 'LORA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, change, message):
    save_peft(tmp_path / "a", random_adapter({Q: 4}))
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "a")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("q_proj", "other"), "which the decoder does not have"),
        (lambda name: name.replace("lora_A", "lora_embedding_A"), "no LoRA factor"),
        (lambda name: name.replace("lora_A", "lora_B.x"), "no LoRA factor"),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path, rename, message):
    save_peft(tmp_path / "a", random_adapter({Q: 4}))
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({rename(name): v for name, v in tensors.items()}, path)
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "a")


def test_damaged_factors_are_refused(tmp_path):
    save_peft(tmp_path / "a", random_adapter({Q: 4}))
    path = tmp_path / "a/adapter_model.safetensors"
    whole = safetensors.numpy.load_file(path)
    a, b = sorted(whole)
    for tensors, message in (
        ({a: whole[a]}, "lacks its factor"),
        ({a: whole[a][:3], b: whole[b]}, "do not fit"),
        ({a: whole[a] * np.nan, b: whole[b]}, "NaN or infinite"),
    ):
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_peft(tmp_path / "a")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="never read"):
        load_peft(tmp_path / "a")


@pytest.fixture(scope="module")
def params():
    return nest({path: jnp.asarray(v) for path, v in dense_params(CONFIG).items()})


def weight(tree, path: str):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _product(params, x):
    return x @ weight(params, Q)


def test_attach_and_detach_share_the_base(params):
    for base in (params, quantize(params, bits=4, group_size=16)):
        adapter = lora.init(base, 2, jax.random.key(0), targets=("*_proj/kernel",))
        assert len(adapter) == 14
        again, found = lora.detach(lora.attach(base, adapter))
        assert jax.tree.structure(again) == jax.tree.structure(base)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(base), strict=True):
            assert a is b
        assert all(found[path].left is adapter[path].left for path in adapter)


def test_stacked_and_switched_adapters(params):
    one, two = random_adapter({Q: 2}, seed=1), random_adapter({Q: 3, DOWN: 2}, seed=2)
    both = lora.attach(lora.attach(params, one), two)
    dense = weight(params, Q) + one[Q].materialize() + two[Q].materialize()
    np.testing.assert_allclose(weight(both, Q).materialize(), dense, rtol=1e-5, atol=1e-6)
    base, sum_ = lora.detach(both)
    assert sum_[Q].rank == 5
    np.testing.assert_allclose(
        sum_[Q].materialize(), one[Q].materialize() + two[Q].materialize(), rtol=1e-5, atol=1e-7
    )
    switched = lora.attach(base, two)
    expected = weight(params, DOWN) + two[DOWN].materialize()
    np.testing.assert_allclose(weight(switched, DOWN).materialize(), expected, rtol=1e-6)
    half = lora.stack(one, two, weights=(0.5, -1.0))
    np.testing.assert_allclose(
        half[Q].materialize(),
        0.5 * one[Q].materialize() - two[Q].materialize(),
        rtol=1e-5,
        atol=1e-7,
    )


def test_merge_and_unmerge(params):
    adapter = random_adapter({Q: 2, DOWN: 3})
    merged = lora.merge(lora.attach(params, adapter))
    assert not any(map(is_compressed, jax.tree.leaves(merged, is_leaf=is_compressed)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    adapted = lift(_product, strict=True)(lora.attach(params, adapter), x)
    # Another order of float32 sums.
    np.testing.assert_allclose(_product(merged, x), adapted, atol=1e-5)
    restored = lora.unmerge(merged, adapter)
    np.testing.assert_allclose(weight(restored, Q), weight(params, Q), atol=1e-7)
    with pytest.raises(ValueError, match="not a dense weight"):
        lora.unmerge(lora.attach(params, adapter), adapter)


def test_difference_is_the_change_of_training(params):
    base = quantize(params, bits=3, group_size=16)
    initial, trained = random_adapter({Q: 2}, seed=1), random_adapter({Q: 2}, seed=2)
    delta = lora.difference(trained, initial)
    assert delta[Q].rank == 4
    on_original = weight(lora.attach(params, delta), Q).materialize()
    compressed = weight(lora.attach(base, trained), Q).materialize()
    decomposition_error = weight(params, Q) - weight(lora.attach(base, initial), Q).materialize()
    np.testing.assert_allclose(on_original, compressed + decomposition_error, atol=1e-6)
    with pytest.raises(ValueError, match="differ in"):
        lora.difference(trained, {})


def test_quantised_adapter_runs_and_is_stored(params, tmp_path):
    adapter = random_adapter(every_kernel(16))
    small = lora.quantize_adapter(adapter)
    part = small[Q]
    dense = np.asarray(adapter[Q].left, np.float64) @ np.asarray(adapter[Q].right, np.float64)
    error = np.linalg.norm(np.asarray(part.materialize()) - dense) / np.linalg.norm(dense)
    assert 0 < error < 0.03  # NF8 of normal values: about 1.5 % for each factor
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    np.testing.assert_allclose(part.matmul(x), x @ part.materialize(), atol=1e-5)
    np.testing.assert_allclose(part.matmul_transposed(x), x @ part.materialize().T, atol=1e-5)
    np.testing.assert_allclose(
        part.take_matrix("k", jnp.array([3, 1])), part.materialize()[jnp.array([3, 1])], atol=1e-6
    )
    adapted = lora.attach(quantize(params, bits=4, group_size=16), small)
    assert isinstance(weight(adapted, Q).parts[1], ProductArray)
    with pytest.raises(TypeError, match="cannot be trained"):
        lora.detach(adapted)
    save(tmp_path / "adapted", adapted, CONFIG)
    assert open_compressed(tmp_path / "adapted").config == CONFIG
    again = read_params(tmp_path / "adapted")
    assert_same_bits(again, adapted)
    product = lift(_product, strict=True)(again, x)
    np.testing.assert_allclose(product, x @ weight(adapted, Q).materialize(), atol=1e-5)


def test_a_target_of_everything_takes_matrices_only():
    stacked = {"norm": {"scale": jnp.ones((2, 32))}, "up": {"kernel": jnp.ones((2, 32, 48))}}
    adapter = lora.init({"layers": stacked}, 2, jax.random.key(0), targets=("*",))
    assert list(adapter) == ["layers/up/kernel"]


def test_bad_adapters_name_the_path(params):
    with pytest.raises(ValueError, match=r"no matrix matches.*nearest"):
        lora.init(params, 2, jax.random.key(0), targets=("*kernal",))
    with pytest.raises(ValueError, match=r"no matrix matches '\*v_prj/kernel'.*nearest"):
        lora.init(params, 2, jax.random.key(0), targets=("*q_proj/kernel", "*v_prj/kernel"))
    with pytest.raises(ValueError, match=r"rank=33 does not fit 'layers/0"):
        lora.init(params, 33, jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers/9.*which the parameters do not"):
        lora.attach(params, {"layers/9/mlp/up_proj/kernel": random_adapter({Q: 2})[Q]})
    with pytest.raises(ValueError, match=r"mlp/up_proj/kernel' has shape \(32, 48\)"):
        lora.attach(params, {"layers/0/mlp/up_proj/kernel": random_adapter({Q: 2})[Q]})


def test_dense_base_gets_a_gradient_for_the_adapter_only(params):
    adapted = lora.attach(params, random_adapter({Q: 2}))
    kernel = weight(adapted, Q)
    assert isinstance(kernel, SumArray)
    assert isinstance(kernel.parts[0], DenseArray)
    assert kernel.parts[0].matrix is weight(params, Q)


@pytest.mark.outside
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_peft_gives_the_same_logits(tmp_path, params):
    """What transformers and peft compute with our files, and we with theirs."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_hf(tmp_path / "base", CONFIG, dense_params(CONFIG))
    small = random_adapter(every_kernel(4)) | random_adapter({Q: 2}, seed=3)
    adapter = lora.stack(small, weights=(20,))  # changes the logits by far more than the tolerance
    save_peft(tmp_path / "adapter", adapter, base_model=str(tmp_path / "base"), alpha=8.0)
    tokens = np.arange(16).reshape(2, 8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = theirs(torch.tensor(tokens)).logits.detach().numpy()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(expected - plain).max() > 0.05
    apply = lift(Decoder(CONFIG).apply)
    ours = apply({"params": lora.attach(params, adapter)}, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(ours, expected, atol=1e-3)

    theirs.save_pretrained(tmp_path / "again")
    back = load_peft(tmp_path / "again")
    again = apply({"params": lora.attach(params, back)}, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(again, expected, atol=1e-3)


@pytest.mark.outside
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_peft_gives_the_same_classes(tmp_path, params):
    """The scores of transformers' classifier with our adapter and head."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from train.lora_step import hidden_states

    write_hf(tmp_path / "base", CONFIG, dense_params(CONFIG))
    adapter = lora.stack(random_adapter(every_kernel(4)), weights=(20,))
    head = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)
    save_peft(tmp_path / "adapter", adapter, base_model=str(tmp_path / "base"), head=head)
    tokens = np.arange(8)[None]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
    hidden = lift(hidden_states(Decoder(CONFIG)))(
        {"params": lora.attach(params, adapter)},
        jnp.asarray(tokens, jnp.int32),
        segments=jnp.ones((1, 8), jnp.int32),
    )
    np.testing.assert_allclose(hidden[:, -1] @ head, expected, atol=1e-3)
