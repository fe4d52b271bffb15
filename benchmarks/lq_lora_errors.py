"""The error of every matrix by LQ-LoRA, LoftQ, LoRC and plain quantisation.

At the same rank and table, `lq <= loftq <= lorc <= quantize` is expected on every one of the 210
matrices of SmolLM2-135M-Instruct, without and with Fisher information (of `benchmarks/lq_lora.py`,
whose cache it shares). A stopped run goes on where it was::

    python benchmarks/lq_lora_errors.py --output benchmarks/results/lq_lora_errors.json
"""

from __future__ import annotations

import os

# LAPACK's threads wait for each other on the thin matrices here; one is many times faster.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
from lq_lora import Settings, Study
from tqdm import tqdm

import lutjax
from lutjax.transforms.decompose import decompose_array

METHODS = {"lq": "lq", "loftq": "loftq", "lorc": "lorc", "quantize": "lora"}
"""Best expected first; an adapter that starts at zero leaves the error of plain quantisation."""


def main() -> None:
    """Measures, and writes the errors with what breaks the order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/lq_lora_errors.json")
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "lutjax-lq-lora"
    )
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--rounds", type=int, default=10, help="most rounds of lq (to its stop: 40 to 100)"
    )
    arguments = parser.parse_args()
    study = Study(Settings(), arguments.cache)
    config = lutjax.LutConfig(arguments.bits, arguments.group_size)
    name = f"errors-{config.bits}-{config.group_size}-{arguments.rank}-{arguments.rounds}.jsonl"
    cache = arguments.cache / name
    cache.touch()
    lines = map(json.loads, cache.read_text().splitlines())
    known = {(line["fisher"], line["path"]): line["errors"] for line in lines}
    todo = itertools.product((False, True), [matrix.path for matrix in study.matrices])
    with cache.open("a") as file:
        for weighted, path in tqdm(list(todo), unit="matrix"):
            if (weighted, path) in known:
                continue
            errors = known[weighted, path] = {
                label: float(
                    decompose_array(
                        study.weights[path],
                        lutjax.Rule(path, config),
                        rank=arguments.rank,
                        method=method,
                        rounds=arguments.rounds if method == "lq" else None,
                        key=jax.random.key(0),
                        fisher=study.fisher[path] if weighted else None,
                        path=path,
                    ).error
                )
                for label, method in METHODS.items()
            }
            file.write(json.dumps({"fisher": weighted, "path": path, "errors": errors}) + "\n")
            file.flush()
    result = {
        "bits": config.bits,
        "group_size": config.group_size,
        "rank": arguments.rank,
        "rounds of lq": arguments.rounds,
        **{
            ("with Fisher" if weighted else "without Fisher"): summary(
                {path: errors for (w, path), errors in known.items() if w == weighted}
            )
            for weighted in (False, True)
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for title in ("without Fisher", "with Fisher"):
        print(title, {k: v for k, v in result[title].items() if k != "errors"})


def summary(errors: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The pairs of neighbours that break the order, and by how much; medians relative to plain."""
    broken = {
        f"{path}: {better} > {worse}": e[better] / e[worse] - 1
        for path, e in errors.items()
        for better, worse in itertools.pairwise(METHODS)
        if e[better] > e[worse]
    }
    medians = {
        method: statistics.median(e[method] / e["quantize"] for e in errors.values())
        for method in METHODS
    }
    return {
        "matrices": len(errors),
        "median error, relative to quantize": medians,
        "violations": broken,
        "errors": {
            path: [float(f"{e[method]:.6g}") for method in METHODS] for path, e in errors.items()
        },
    }


if __name__ == "__main__":
    main()
