"""Optimiser-state bytes by shapes, against the formula and the figures of the GaLore paper."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

from lutjax.linear_maps import matching
from lutjax.optim import flora, galore
from train.llama_configs import GALORE_RANKS, LLAMA
from train.memory import format_table, galore_numbers, memory_table, param_shapes, state_bytes
from train.methods import PROJECTED


@pytest.mark.parametrize(("m", "n", "rank"), [(512, 1376, 128), (1376, 512, 128), (512, 512, 1)])
def test_galore_state_is_the_published_formula(m, n, rank):
    weight = {"w": jax.ShapeDtypeStruct((m, n), jnp.bfloat16)}
    # 2 bytes a number; besides them the projection's key and count and Adam's count.
    assert state_bytes(galore(1e-3, rank=rank), weight) == 2 * galore_numbers(m, n, rank) + 16
    assert galore_numbers(m, n, rank) == min(m, n) * rank + 2 * max(m, n) * rank


def test_a_projection_from_a_key_stores_only_the_moments():
    weight = {"w": jax.ShapeDtypeStruct((512, 1376), jnp.bfloat16)}
    assert state_bytes(flora(1e-3, rank=128), weight) == 2 * 2 * 1376 * 128 + 16 + 12


@pytest.mark.parametrize("name", ["60m", "7b"])
def test_whole_models_by_the_formula(name):
    config, rank = LLAMA[name], GALORE_RANKS[name]
    d, f, vocab, layers = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_layers,
    )
    projected = 4 * galore_numbers(d, d, rank) + 3 * galore_numbers(d, f, rank)
    others = 2 * (2 * vocab * d + (2 * layers + 1) * d)
    params = param_shapes(config)
    optimizer = galore(1e-3, rank=rank, weight_dimension_numbers=matching(*PROJECTED))
    assert state_bytes(optimizer, params) == 2 * (layers * projected + others) + 16
    dense = layers * (4 * d * d + 3 * d * f) * 2 + others
    assert state_bytes(optax.adam(1e-3), params) == 2 * dense + 4


def test_llama_7b_saves_what_the_paper_says_within_seconds():
    start = time.process_time()
    (row,) = memory_table(("7b",))
    assert time.process_time() - start < 20
    # Published: 65.5 % and 82.5 %.
    assert 1 - row["galore"] / row["adam"] == pytest.approx(0.65, abs=0.005)
    assert 1 - row["galore_8bit"] / row["adam"] == pytest.approx(0.825, abs=0.005)
    assert row["params"] == 6_738_415_616
    assert "| 7b | 1024 | 26.954 |" in format_table([row])
