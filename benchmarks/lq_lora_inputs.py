"""LQ-LoRA by the products on a text, against Fisher information and plain codes.

    python benchmarks/lq_lora_inputs.py [--output DIR]

The protocol is that of benchmarks/lq_lora.py: SmolLM2-135M-Instruct, 4 held-out windows of 256
tokens, before and after 16 steps that train low-rank parts of rank 32 alone, each method with the
learning rate that is best for it. All weights are 3-bit NormalFloat in groups of 64; what differs
is how they are rounded and what the low-rank part starts from. Fisher information comes from 32
samples of 128 tokens, the inputs from 32 windows of 512; all of them, and what is trained on, are
other windows of the same text. Takes about 20 minutes on two cores. Writes lq_lora_inputs.json and
lq_lora_inputs.md, and goes on where these end; delete them to start anew.
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
from lq_lora import Settings, Study, Training
from tqdm import tqdm

import lutjax
from lutjax import Recipe
from lutjax.adapters import lora
from lutjax.calibrate import decompose_decoder, quantize_decoder
from lutjax.transforms import Summary

RESULTS = Path(__file__).parent / "results"
RECIPE = Recipe.uniform(3)  # NormalFloat in groups of 64
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
WINDOWS = 32
METHODS = {
    "nearest": "nearest value, new adapter (QLoRA)",
    "feedback": "error feedback, new adapter",
    "fisher": "LQ + Fisher",
    "inputs": "by the inputs",
}


def starts(study: Study) -> dict[str, Callable[[], Any]]:
    """What makes the compressed parameters, by method."""
    config, params, rank = study.model.config, study.params, study.settings.rank
    places = [i * len(study.others) // WINDOWS for i in range(WINDOWS)]
    tokens, key = jnp.asarray(study.others[places]), jax.random.key(0)
    low_rank: dict[str, Any] = {"rank": rank, "key": key, "progress": True}
    fisher = {"fisher": study.fisher, "rounds": study.settings.rounds}
    fed: dict[str, Any] = {"batch_size": 8}
    return {
        "nearest": lambda: lutjax.quantize(params, RECIPE),
        "feedback": lambda: quantize_decoder(config, params, tokens, RECIPE, **fed, progress=True),
        "fisher": lambda: lutjax.decompose(params, RECIPE, **fisher, **low_rank),
        "inputs": lambda: decompose_decoder(config, params, tokens, RECIPE, **fed, **low_rank),
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
    dense, rows = data["dense"], data["rows"]
    lines = ["| start | before training | after | learning rate |", "|---|---|---|---|"]
    lines.append(f"| dense, new adapter | {dense['before']:.2f} | {dense['after']:.2f} | |")
    lines += [
        f"| {METHODS[m]} | {row['before']:.2f} | {row['after']:.2f} | {row['learning_rate']} |"
        for m, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


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
    new = {"jax": jax.__version__, "dense": None, "rows": {}}
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else new
    data["dense"] = data["dense"] or dense(study, training)
    for method, start in tqdm(starts(study).items(), unit="method"):
        if method in data["rows"]:
            continue
        base, adapter, bits = split(study, start())
        found = {rate: training.after(base, adapter, rate) for rate in RATES}
        rate = min(found, key=lambda rate: found[rate])
        data["rows"][method] = {
            "bits_per_weight": bits,
            "before": training.before(base, adapter),
            "after": found[rate],
            "learning_rate": rate,
        }
        file.write_text(json.dumps(data, indent=1) + "\n")
        (options.output / "lq_lora_inputs.md").write_text(markdown(data))


if __name__ == "__main__":
    main()
