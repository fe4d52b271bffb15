from __future__ import annotations

import json

import pytest
from test_cli import TEXT, fails, ok
from tiny_checkpoint import dense_params, write_hf


@pytest.fixture
def source(tmp_path, tiny_config):
    return str(write_hf(tmp_path / "source", tiny_config, dense_params(tiny_config)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize("method", ["greedy", "wina"])
def test_sparsify_then_eval_and_generate(capsys, source, text, tmp_path, method):
    plan = tmp_path / "plan.json"
    options = ["--text", text, "--window", 16, "--samples", 2, "--method", method, "--step", 0.05]
    out = ok(capsys, "sparsify", source, "--target", 0.5, "-o", plan, *options)
    assert method in out and "on a window that was not used" in out
    assert len(json.loads(plan.read_text())["gates"]) % 7 == 0
    common = ["--text", text, "--window", 16, "--chunks", 2, "--json"]
    (dense,) = json.loads(ok(capsys, "eval", source, *common))
    (sparse,) = json.loads(ok(capsys, "eval", source, *common, "--sparsity", plan))
    assert sparse["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-6)
    ok(capsys, "generate", source, "--prompt", "abc", "--max-new-tokens", 2, "--sparsity", plan)


def test_bad_input(capsys, source, text, tmp_path):
    plan = tmp_path / "plan.json"
    error = fails(capsys, "sparsify", source, "--target", 1.0, "-o", plan, "--text", text)
    assert "target=1.0 is outside [0, 1)" in error and not plan.exists()
    for options, message in (
        (("-o", tmp_path), "is a directory; name a file in it"),
        (("-o", plan, "--plot", tmp_path / "absent" / "plot.png"), "absent is not a directory"),
        (("-o", plan, "--plot", tmp_path / "plot.xyz"), "plot.xyz: use a name that ends in .png"),
        (("-o", plan, "--step", 0.6), "--step 0.6 must be above 0 and at most --target 0.5"),
        (("-o", plan, "--samples", 0), "--samples must be at least 1"),
    ):
        error = fails(capsys, "sparsify", "no-model", "--target", 0.5, *options)
        assert message in error and not plan.exists()
    plan.write_text("{}")
    error = fails(capsys, "eval", source, "--text", text, "--window", 16, "--sparsity", plan)
    assert "not a sparsity plan" in error
