"""Perplexity of SmolLM2-135M-Instruct with rotated weights (HIGGS), uniform and planned.

    python benchmarks/higgs.py [--budgets 4.25 3.75 3.25 2.75] [--output DIR]

The sensitivities to noise are measured on parts of the text that the perplexity is not, once: they
stay in higgs_sensitivities.json (about 15 minutes on two cores). Beside each perplexity stands the
one that they predict. Writes higgs.json and higgs.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.allocate import CostTable, allocate, higgs_grid
from lutjax.allocate.grid import gaussian_error
from lutjax.calibrate import next_token_loss, noise_sensitivities, plannable
from lutjax.evaluate import perplexity, windows
from lutjax.io import demo_model_path
from lutjax.transforms import Summary

CALIBRATED = 6  # windows of 128 tokens, evenly spaced like those that are evaluated


def split(ids: list[int], chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to evaluate and to calibrate on."""
    places = list(range(len(ids)))
    evaluated, calibrated = windows(places, 512, chunks), windows(places[8192:], 128, CALIBRATED)
    if np.intersect1d(evaluated, calibrated).size:
        raise SystemExit(f"--chunks {chunks}: the windows overlap those that are calibrated on")
    tokens = np.asarray(ids, np.int32)
    return tokens[evaluated], tokens[calibrated]


def sensitivities(file: Path, model: Any, params: Any, text: np.ndarray) -> dict[str, float]:
    """Those of the file, or measured and written to it."""
    if not file.is_file():
        found = noise_sensitivities(
            next_token_loss(model.apply),
            params,
            list(text),
            key=jax.random.key(0),
            progress=True,
        )
        file.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(file.read_text())


def recipes(
    params: Any, alphas: dict[str, float], budgets: list[float]
) -> dict[str, tuple[lutjax.Recipe | None, float | None]]:
    """What is compared, and the growth of the loss that the sensitivities predict."""
    grid = higgs_grid((1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8))
    table = CostTable.of_sensitivities(plannable(params), grid, alphas)
    found: dict[str, Any] = {"dense": (None, 0.0)}
    for bits in (4, 3):
        found[f"NormalFloat, {bits} bits, groups of 64"] = lutjax.Recipe.uniform(bits), None
    for bits in (4, 3.5, 3):
        growth = gaussian_error(lutjax.LutConfig.higgs(bits)) * sum(alphas.values())
        found[f"HIGGS, {bits} bits for all"] = lutjax.Recipe.higgs(bits), growth
    for budget in budgets:
        plan = allocate(table, budget)
        found[f"HIGGS, planned at {budget}"] = plan, plan.cost
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| weights | bits a weight | perplexity | predicted |", "|---|---|---|---|"]
    for r in results:
        predicted = "" if r["predicted"] is None else f"{r['predicted']:.2f}"
        lines.append(
            f"| {r['name']} | {r['bits_per_weight']:.3f} | {r['perplexity']:.2f} | {predicted} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.25, 3.75, 3.25, 2.75])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    from lutjax.cli.models import evaluation_text, lifted_if_needed

    model, dense, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    text, calibrated = split(ids, arguments.chunks)
    arguments.output.mkdir(parents=True, exist_ok=True)
    alphas = sensitivities(arguments.output / "higgs_sensitivities.json", model, dense, calibrated)
    results = []
    compared = recipes(dense, alphas, arguments.budgets)
    for name, (recipe, growth) in tqdm(compared.items(), unit="recipe"):
        start = time.perf_counter()
        params = dense if recipe is None else lutjax.quantize(dense, recipe)
        jax.block_until_ready(params)
        found = perplexity(lifted_if_needed(model.apply, params), params, text).perplexity
        summary = lutjax.summarize(params)
        matrices = Summary(tuple(leaf for leaf in summary.leaves if "_proj/" in leaf.path))
        base = results[0]["perplexity"] if results else found
        results.append(
            {
                "name": name,
                "perplexity": found,
                "predicted": None if growth is None else base * math.exp(growth),
                "bits_per_weight": matrices.bits_per_weight,
                "seconds": time.perf_counter() - start,
            }
        )
        tqdm.write(markdown(results).splitlines()[-1])
        data = {"jax": jax.__version__, "windows": len(text), "results": results}
        (arguments.output / "higgs.json").write_text(json.dumps(data, indent=1) + "\n")
        (arguments.output / "higgs.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
