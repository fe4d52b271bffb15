"""Uniform sparsity on SmolLM2 against figures from outside (tests/data/smollm2/teal.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lutjax
from lutjax.evaluate import perplexity
from lutjax.sparsity import plan_thresholds, sparsify

FILE = Path(__file__).parents[2] / "data" / "smollm2" / "teal.json"
INPUTS = {
    "attn_in": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "o_in": ("self_attn/o_proj",),
    "mlp_in": ("mlp/gate_proj", "mlp/up_proj"),
    "down_in": ("mlp/down_proj",),
}


# 25 % agrees to 0.15 % (14.178 against 14.199); it would double the time.
@pytest.mark.parametrize("share", ["0.5"])
def test_perplexity_with_the_outside_thresholds(smollm2, share):
    outside = json.loads(FILE.read_text())
    thresholds = {}
    for key, by_share in outside["thresholds"].items():
        layer, kind = key.split(".")
        for name in INPUTS[kind]:
            thresholds[f"layers/{layer}/{name}/kernel"] = by_share[share]
    params = sparsify(smollm2.params, plan_thresholds(smollm2.params, thresholds))
    found = perplexity(lutjax.lift(smollm2.model.apply), params, smollm2.windows)
    # Rounding moves values across thresholds, and these move others: noise of 1e-6 in the embedding
    # gives 22.64 to 22.84, and two machines gave 22.669 and 22.830.
    assert found.perplexity == pytest.approx(outside["perplexity"][share], rel=2e-2)
