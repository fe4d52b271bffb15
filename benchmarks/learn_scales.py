"""Perplexity of SmolLM2-135M-Instruct when the scales of its rounded weights have been learnt.

    python benchmarks/learn_scales.py [--windows 32] [--epochs 1] [--output DIR]

Weights are rounded with error feedback on 32 windows of 512 tokens as in benchmarks/feedback.py;
then their scales are trained on the same windows such that the logits are like those of the dense
model. The 16 windows that are evaluated are other places of the same text; in the last row both
steps use other text, the source code of Python's standard library. An epoch takes about three
minutes on two cores, everything about 30. Writes learn_scales.json and learn_scales.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from feedback import RESULTS, bits_per_weight, setting
from tqdm import tqdm

import lutjax
from lutjax import Recipe
from lutjax.calibrate import learn_scales, quantize_decoder, scale_factors
from lutjax.evaluate import perplexity

RECIPES = {
    "NormalFloat, 4 bits, groups of 64": Recipe.uniform(4),
    "NormalFloat, 3 bits, groups of 64": Recipe.uniform(3),
    "HIGGS, 3 bits for all": Recipe.higgs(3),
    "HIGGS, 2 bits for all": Recipe.higgs(2),
    "HIGGS, 2 bits, groups of 64": Recipe.higgs(2, group_size=64),
}


def markdown(results: list[dict[str, Any]], epochs: list[int]) -> str:
    heads = ["weights", "bits a weight", "scales (thousands)", "error feedback"]
    heads += [f"{n} epoch{'s' * (n > 1)} of scales" for n in epochs]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in results:
        cells = [r["name"], f"{r['bits_per_weight']:.3f}", f"{r['scales'] / 1000:.0f}"]
        learnt = (f"{r['learnt'][str(n)]:.2f}" if str(n) in r["learnt"] else "" for n in epochs)
        lines.append(f"| {' | '.join([*cells, format(r['feedback'], '.2f'), *learnt])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, dense, text, calibrated, other = setting(arguments.windows)
    apply = lutjax.lift(model.apply)
    arguments.output.mkdir(parents=True, exist_ok=True)

    def logits(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, tokens)

    cases = [(name, recipe, calibrated) for name, recipe in RECIPES.items()]
    cases.append(("HIGGS, 2 bits for all, other text", RECIPES["HIGGS, 2 bits for all"], other))
    results: list[dict[str, Any]] = []
    for name, recipe, rows in tqdm(cases, unit="recipe"):
        tokens = jnp.asarray(rows)
        params = quantize_decoder(model.config, dense, tokens, recipe, batch_size=8)
        result: dict[str, Any] = {
            "name": name,
            "bits_per_weight": bits_per_weight(params),
            "scales": sum(factor.size for factor in scale_factors(params).values()),
            "feedback": perplexity(apply, params, text).perplexity,
            "learnt": {},
            "seconds": {},
        }
        results.append(result)
        for epochs in arguments.epochs:
            start = time.perf_counter()
            batches = [row[None] for row in tokens]
            learnt = learn_scales(logits, params, dense, batches, epochs=epochs, progress=True)
            jax.block_until_ready(learnt)
            result["seconds"][str(epochs)] = time.perf_counter() - start
            result["learnt"][str(epochs)] = perplexity(apply, learnt, text).perplexity
            table = markdown(results, arguments.epochs)
            data = {"jax": jax.__version__, "windows": arguments.windows, "results": results}
            (arguments.output / "learn_scales.json").write_text(json.dumps(data, indent=1) + "\n")
            (arguments.output / "learn_scales.md").write_text(table)
        tqdm.write(markdown(results, arguments.epochs).splitlines()[-1])


if __name__ == "__main__":
    main()
