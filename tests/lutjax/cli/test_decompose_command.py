from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import dense_params, write_hf

import lutjax
from lutjax.allocate import Plan
from lutjax.arrays import RotatedArray
from lutjax.cli import main

TEXT = "abc def ghij klm. nop 123? " * 40


@pytest.fixture
def source(tmp_path, tiny_config):
    return str(write_hf(tmp_path / "source", tiny_config, dense_params(tiny_config)))


def ok(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out and "Traceback" not in captured.err
    return captured.err


def test_allocate_decompose_eval(capsys, tmp_path, source):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text(TEXT)
    fisher = ("--fisher", tmp_path / "fisher.safetensors", "--text", text)
    sizes = ("--samples", 2, "--window", 8)
    printed = ok(
        capsys,
        *("allocate", source, "--budget", 5.5, "--rank", 2, "--rounds", 1, "--candidates", 2),
        *(*fisher, *sizes, "--cache", tmp_path / "costs.jsonl"),
        *("-o", plan, "--plot", tmp_path / "plan.png"),
    )
    assert "14 matrices" in printed and (tmp_path / "plan.png").exists()
    assert Plan.load(plan).bits_per_weight <= 5.5
    out = tmp_path / "out"
    printed = ok(
        capsys,
        *("decompose", source, "-o", out, "--plan", plan, "--rank", 2, "--method", "lorc"),
        *fisher[:2],
    )
    assert "14 matrices" in printed
    _, params, _ = lutjax.load(out)
    assert isinstance(params["layers"]["0"]["mlp"]["up_proj"]["kernel"], lutjax.SumArray)
    result = ok(capsys, "eval", out, "--text", text, "--window", 16, "--chunks", 2, "--json")
    assert json.loads(result)[0]["perplexity"] > 1


def test_products_on_a_text_may_count_instead(capsys, tmp_path, source):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    decompose = ("decompose", source, "-o", out, "--rank", 2, "--group-size", 16)
    by_inputs = (*decompose, "--weighting", "inputs")
    assert "name one with --text" in fails(capsys, *by_inputs)
    with_text = (*by_inputs, "--text", text, "--samples", 2, "--window", 8)
    assert "not both" in fails(capsys, *with_text, "--fisher", tmp_path / "f.safetensors")
    assert "rank=0" in fails(capsys, *with_text, "--rank", 0)
    assert not out.exists()
    printed = ok(capsys, *with_text)
    assert "14 matrices" in printed and "error" not in printed
    _, params, _ = lutjax.load(out)
    assert isinstance(params["layers"]["0"]["mlp"]["up_proj"]["kernel"], lutjax.SumArray)
    assert "exists" in fails(capsys, *with_text)


def test_allocate_higgs_and_quantize(capsys, tmp_path, source):
    text, plan = tmp_path / "text.txt", tmp_path / "plan.json"
    text.write_text(TEXT)
    sizes = ("--samples", 2, "--window", 8)
    budget = ("--higgs", "--budget", 7.5)
    printed = ok(capsys, "allocate", source, *budget, "--text", text, *sizes, "-o", plan)
    assert "14 matrices" in printed and "low-rank" not in printed
    assert Plan.load(plan).bits_per_weight <= 7.5
    ok(capsys, "quantize", source, "-o", tmp_path / "out", "--recipe", plan)
    _, params, _ = lutjax.load(tmp_path / "out")
    assert isinstance(params["layers"]["0"]["mlp"]["up_proj"]["kernel"], RotatedArray)
    printed = ok(capsys, "allocate", "--shapes", "smollm2-135m", "--higgs", "--budget", 3.3)
    assert "low-rank" not in printed
    assert "name one with --text" in fails(capsys, "allocate", source, *budget)
    ignored = ("--text", text, "--rank", 2)
    assert "--higgs or --rank" in fails(capsys, "allocate", source, *budget, *ignored)


def test_allocate_from_shapes(capsys, tmp_path, source):
    printed = ok(capsys, "allocate", "--shapes", "smollm2-135m", "--budget", 2.75, "--full")
    assert "layers/29/mlp/down_proj/kernel" in printed
    # Everything counted: 135M weights, adapters of rank 8, in 60 MB.
    counted = ("--count-adapters", "--count-embeddings", "--rank", 8)
    printed = ok(capsys, "allocate", "--shapes", "smollm2-135m", "--budget-mb", 110, *counted)
    total = float(printed.rsplit("= ", 1)[1].split()[0])
    assert 105 < total <= 110
    config = f"{source}/config.json"
    assert "14 matrices" in ok(capsys, "allocate", "--shapes", config, "--budget", 6)


def test_all_parameters_of_a_configuration_are_planned_or_counted(capsys, tmp_path):
    mixtral = Path(__file__).parents[2] / "data" / "mixtures" / "mixtral" / "config.json"
    printed = ok(capsys, "allocate", "--shapes", mixtral, "--budget", 7)
    # In each of 2 layers 4 matrices of attention and 3 for all of 4 experts; the rest has a router.
    assert "14 matrices, 24,576 weights" in printed
    assert "gate_proj         2" in printed
    others = 2 * 64 * 32 + 2 * (32 * 4 + 2 * 32) + 32
    assert f"embeddings, head, norms {2 * others / 1e3:.1f} kB" in printed
    # Qwen2 has biases.
    qwen2 = json.loads(mixtral.read_text()) | {"model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(qwen2))
    printed = ok(capsys, "allocate", "--shapes", tmp_path / "config.json", "--budget", 7)
    assert "14 matrices" in printed
    others = 2 * 64 * 32 + 2 * (32 + 2 * 16 + 2 * 32) + 32
    assert f"embeddings, head, norms {2 * others / 1e3:.1f} kB" in printed


def test_bad_input(capsys, tmp_path, source):
    shapes = ("allocate", "--shapes", "smollm2-135m")
    assert "smallest feasible one is" in fails(capsys, *shapes, "--budget", 1)
    assert "either --budget or --budget-mb" in fails(capsys, *shapes)
    assert "either a MODEL or --shapes" in fails(capsys, "allocate", "--budget", 3)
    unknown = fails(capsys, "allocate", "--shapes", "gpt", "--budget", 3)
    assert "unknown model" in unknown and "llama-2-70b" in unknown
    assert "does not exist" in fails(capsys, *shapes, "--budget", 3, "-o", tmp_path / "no" / "p")
    # Known before anything is measured or calibrated.
    assert "smallest feasible" in fails(capsys, "allocate", source, "--budget", 1, "--rank", 2)
    out = tmp_path / "out"
    decompose = ("decompose", source, "-o", out, "--group-size", 16)
    assert "rank=64 does not fit" in fails(capsys, *decompose)
    assert "rank=0" in fails(capsys, *decompose, "--rank", 0)
    assert "--samples needs --text" in fails(capsys, *decompose, "--samples", 3)
    allocate = ("allocate", source, "--budget", 5)
    assert "--window needs --text" in fails(capsys, *allocate, "--window", 3)
    assert "either --shapes or --text" in fails(capsys, *shapes, "--budget", 3, "--text", source)
    (tmp_path / "list.json").write_text("[]")
    listed = ("allocate", "--shapes", tmp_path / "list.json", "--budget", 3)
    assert "list.json does not hold a JSON object" in fails(capsys, *listed)
    assert "not both" in fails(capsys, *decompose, "--plan", tmp_path / "plan.json")
    missing = ("--rank", 2, "--fisher", tmp_path / "none")
    assert "does not exist" in fails(capsys, *decompose, *missing)
    (tmp_path / "plan.json").write_text("{}")
    plan = ("decompose", source, "-o", out, "--plan", tmp_path / "plan.json", "--rank", 2)
    assert "plan.json: not a recipe" in fails(capsys, *plan)
    assert not out.exists()
