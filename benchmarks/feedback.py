"""Perplexity of SmolLM2-135M-Instruct when weights are rounded with error feedback (GPTQ).

    python benchmarks/feedback.py [--windows 32] [--output DIR]

Every recipe twice: each weight to its nearest value, and such that products err little on 32
windows of 512 tokens. These come from the same text as the 16 windows that are evaluated, but from
other places in it; the last row takes them from other text instead, the source code of Python's
standard library. Plans are those of benchmarks/higgs.py, from its sensitivities. Takes about 20
minutes on two cores. Writes feedback.json and feedback.md.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from higgs import recipes
from tqdm import tqdm

import lutjax
from lutjax import Recipe
from lutjax.calibrate import quantize_decoder
from lutjax.evaluate import perplexity, windows
from lutjax.io import Tokenizer, demo_model_path
from lutjax.models import Decoder
from lutjax.transforms import Summary

WINDOW, EVALUATED = 512, 16
RESULTS = Path(__file__).parent / "results"
BUDGETS = [3.25]


def split(ids: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows that are evaluated, and ``count`` of the others."""
    places = windows(range(len(ids)), WINDOW, len(ids))
    evaluated = windows(range(len(ids)), WINDOW, EVALUATED)
    others = places[~np.isin(places[:, 0], evaluated[:, 0])]
    chosen = others[np.arange(count) * len(others) // count]
    tokens = np.asarray(ids, np.int32)
    return tokens[evaluated], tokens[chosen]


class Setting(NamedTuple):
    """The dense model, the windows that are evaluated, and those of either text to calibrate on."""

    model: Decoder
    dense: Any
    text: np.ndarray
    calibrated: np.ndarray
    other: np.ndarray


def setting(count: int) -> Setting:
    """The demo model, with ``count`` windows to calibrate on."""
    from lutjax.cli.models import evaluation_text

    model, dense, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    return Setting(model, dense, *split(ids, count), source_code(tokenizer, count))


def bits_per_weight(params: Any) -> float:
    """Stored bits a weight of the matrices of the blocks."""
    leaves = lutjax.summarize(params).leaves
    return Summary(tuple(leaf for leaf in leaves if "_proj/" in leaf.path)).bits_per_weight


def source_code(tokenizer: Tokenizer, count: int) -> np.ndarray:
    """Windows of the modules of the standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files[::8])
    return windows(tokenizer.encode(text, add_special_tokens=False), WINDOW, count)


def compared(params: Any) -> dict[str, Recipe]:
    """The recipes by what they are called."""
    alphas = json.loads((RESULTS / "higgs_sensitivities.json").read_text())
    higgs = recipes(params, alphas, BUDGETS)
    return {
        "NormalFloat, 4 bits, groups of 64": Recipe.uniform(4),
        "NormalFloat, 3 bits, groups of 64": Recipe.uniform(3),
        "HIGGS, 4 bits for all": Recipe.higgs(4),
        "HIGGS, 3 bits for all": Recipe.higgs(3),
        "HIGGS, 2 bits for all": Recipe.higgs(2),
        **{f"HIGGS, planned at {b}": higgs[f"HIGGS, planned at {b}"][0] for b in BUDGETS},
    }


def markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| weights | bits a weight | nearest value | error feedback |", "|---|---|---|---|"]
    for r in results:
        nearest = "" if r["nearest"] is None else f"{r['nearest']:.2f}"
        fed = f"{r['feedback']:.2f}"
        lines.append(f"| {r['name']} | {r['bits_per_weight']:.3f} | {nearest} | {fed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, dense, text, calibrated, other = setting(arguments.windows)
    apply = lutjax.lift(model.apply)
    arguments.output.mkdir(parents=True, exist_ok=True)
    cases = [(name, recipe, calibrated) for name, recipe in compared(dense).items()]
    cases.append(("HIGGS, 3 bits for all, other text", Recipe.higgs(3), other))
    results: list[dict[str, Any]] = []
    for name, recipe, tokens in tqdm(cases, unit="recipe"):
        nearest = None
        if tokens is calibrated:
            nearest = perplexity(apply, lutjax.quantize(dense, recipe), text).perplexity
        start = time.perf_counter()
        params = quantize_decoder(model.config, dense, jnp.asarray(tokens), recipe, batch_size=8)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
        results.append(
            {
                "name": name,
                "bits_per_weight": bits_per_weight(params),
                "nearest": nearest,
                "feedback": perplexity(apply, params, text).perplexity,
                "seconds": seconds,
            }
        )
        tqdm.write(markdown(results).splitlines()[-1])
        data = {"jax": jax.__version__, "windows": arguments.windows, "results": results}
        (arguments.output / "feedback.json").write_text(json.dumps(data, indent=1) + "\n")
        (arguments.output / "feedback.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
