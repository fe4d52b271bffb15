"""LQ-LoRA by the products on a text, against Fisher information and plain codes.

    python benchmarks/lq_lora_inputs.py [--output DIR]

The protocol is that of benchmarks/lq_lora.py: SmolLM2-135M-Instruct, 4 held-out windows of 256
tokens, before and after 16 steps that train low-rank parts of rank 32 alone, each method with the
learning rate that is best for it with NormalFloat. Weights are quantised alike for all methods;
what differs is what the codes and the low-rank part start from. Fisher information comes from 32
samples of 128 tokens, the inputs from 32 windows of 512; all of them, and what is trained on, are
other windows of the same text. Plans are those of benchmarks/higgs.py. Takes about 40 minutes on
two cores. Writes lq_lora_inputs.json and lq_lora_inputs.md, and goes on where these end; delete
them to start anew.
"""

from __future__ import annotations

import os

# LAPACK's threads wait for each other on the thin matrices here; one is many times faster.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from higgs import recipes
from lq_lora import Settings, Study, Training
from tqdm import tqdm

import lutjax
from lutjax import Recipe
from lutjax.adapters import lora
from lutjax.calibrate import decompose_decoder, quantize_decoder
from lutjax.transforms import Summary

RESULTS = Path(__file__).parent / "results"
BUDGETS = [2.5]
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
WINDOWS = 32
METHODS = {
    "nearest": "nearest value, new adapter (QLoRA)",
    "feedback": "error feedback, new adapter",
    "fisher": "LQ + Fisher",
    "inputs": "by the inputs",
}


def compared(params: Any) -> dict[str, Recipe]:
    """The recipes by what they are called."""
    alphas = json.loads((RESULTS / "higgs_sensitivities.json").read_text())
    planned = recipes(params, alphas, BUDGETS)
    return {
        "NormalFloat, 3 bits, groups of 64": Recipe.uniform(3),
        "HIGGS, 3 bits for all": Recipe.higgs(3),
        **{f"HIGGS, planned at {b}": planned[f"HIGGS, planned at {b}"][0] for b in BUDGETS},
    }


def starts(study: Study) -> dict[str, Callable[[Recipe], Any]]:
    """What makes base and adapter from a recipe, by method."""
    config, params, rank = study.model.config, study.params, study.settings.rank
    places = [i * len(study.others) // WINDOWS for i in range(WINDOWS)]
    tokens, key = jnp.asarray(study.others[places]), jax.random.key(0)
    fed = {"batch_size": 8, "progress": True}
    return {
        "nearest": lambda recipe: lutjax.quantize(params, recipe),
        "feedback": lambda recipe: quantize_decoder(config, params, tokens, recipe, **fed),
        "fisher": lambda recipe: lutjax.decompose(
            params,
            recipe,
            rank=rank,
            rounds=study.settings.rounds,
            key=key,
            fisher=study.fisher,
            progress=True,
        ),
        "inputs": lambda recipe: decompose_decoder(
            config, params, tokens, recipe, rank=rank, key=key, **fed
        ),
    }


def split(study: Study, params: Any) -> tuple[Any, Any, float]:
    """The base made dense, the low-rank parts that training starts with, and bits a weight."""
    base, adapter = lora.detach(params)
    leaves = [leaf for leaf in lutjax.summarize(base).leaves if "_proj/" in leaf.path]
    if not adapter:
        paths = tuple(leaf.path for leaf in leaves)
        adapter = lora.init(base, study.settings.rank, jax.random.key(0), targets=paths)
    return lutjax.materialize(base), adapter, Summary(tuple(leaves)).bits_per_weight


def markdown(data: dict[str, Any]) -> str:
    lines = [
        "Perplexity before → after training the low-rank parts (rank 32, not counted in the bits); "
        f"the dense model: {data['dense']['before']:.2f} → {data['dense']['after']:.2f}.",
        "",
        "| weights | bits a weight | " + " | ".join(METHODS.values()) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for name, row in data["rows"].items():
        cells = [f"{row[m]['before']:.2f} → {row[m]['after']:.2f}" for m in METHODS if m in row]
        bits = next(iter(row.values()))["bits_per_weight"]
        lines.append(f"| {name} | {bits:.3f} | " + " | ".join(cells) + " |")
    rates = ", ".join(f"{METHODS[m]}: {rate}" for m, rate in data["learning_rates"].items())
    return "\n".join([*lines, "", f"Learning rates: {rates}.", ""])


def dense(study: Study, training: Training) -> dict[str, float]:
    """The model as it is, and with a trained adapter."""
    paths = tuple(matrix.path for matrix in study.matrices)
    new = lora.init(study.params, study.settings.rank, jax.random.key(0), targets=paths)
    after = min(training.after(study.params, new, rate) for rate in RATES)
    return {"before": training.before(study.params, new), "after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "lutjax-lq-lora"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "lq_lora_inputs.json"
    study = Study(Settings(), options.cache)
    training = Training(study)
    data: dict[str, Any] = (
        json.loads(file.read_text())
        if file.exists()
        else {
            "jax": jax.__version__,
            "dense": dense(study, training),
            "learning_rates": {},
            "rows": {},
        }
    )
    made = starts(study)
    for name, recipe in tqdm(compared(study.params).items(), unit="recipe"):
        row = data["rows"].setdefault(name, {})
        for method, start in made.items():
            if method in row:
                continue
            base, adapter, bits = split(study, start(recipe))
            if method not in data["learning_rates"]:
                found = {rate: training.after(base, adapter, rate) for rate in RATES}
                data["learning_rates"][method] = min(found, key=lambda rate: found[rate])
            row[method] = {
                "bits_per_weight": bits,
                "before": training.before(base, adapter),
                "after": training.after(base, adapter, data["learning_rates"][method]),
            }
            tqdm.write(f"{name}, {method}: {row[method]}")
            file.write_text(json.dumps(data, indent=1) + "\n")
            (options.output / "lq_lora_inputs.md").write_text(markdown(data))


if __name__ == "__main__":
    main()
