"""Perplexity of SmolLM2-135M over activation sparsity: uniform, greedy and WINA thresholds.

    python benchmarks/sparsity.py

Calibrates on docstrings of Python's standard library and evaluates on its help topics, on the dense
weights and on 4-bit ones. Every result is written at once, so a killed run goes on where it was.
Writes sparsity.json, sparsity.png, the greedy search and plan plots to benchmarks/results/sparsity;
the calibration (2 MB each) goes to a cache.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.calibrate import ActivationQuantiles, activation_quantiles
from lutjax.cli.models import evaluation_text
from lutjax.evaluate import perplexity, windows
from lutjax.io import demo_model_path
from lutjax.models.blockwise import decoder_blocks
from lutjax.sparsity import (
    greedy_search,
    measure_sparsity,
    plan_greedy,
    plan_uniform,
    recalibrate,
    sparsify,
)

METHODS = ("uniform", "greedy", "wina")
MODULES = """
argparse collections/__init__ contextlib dataclasses difflib doctest email/message fractions
functools heapq inspect ipaddress logging/__init__ optparse pathlib pdb random shutil statistics
string subprocess tarfile textwrap threading turtle typing unittest/case unittest/mock uuid zipfile
"""


def calibration_text() -> str:
    """Docstrings of the standard library: prose and code, none of it in the help topics."""
    found = []
    for name in MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        found += [ast.get_docstring(node) for node in nodes]
    return "\n\n".join(text for text in found if text)


def quantiles(fn, params, batches, score: str, path: Path) -> ActivationQuantiles:
    if path.exists():
        return ActivationQuantiles.load(path)
    found = activation_quantiles(fn, params, batches, score=score, progress=True)
    found.save(path)
    return found


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, weights in zip(figure.subplots(1, 2, sharey=True), ("dense", "4-bit"), strict=True):
        for method in METHODS:
            points = sorted(
                (100 * r["achieved"], r["perplexity"])
                for r in results["runs"].values()
                if r["weights"] == weights and r["method"] == method
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        axes.axhline(results["baseline"][weights], color="gray", linestyle=":", label="no sparsity")
        axes.set(title=f"{weights} weights", xlabel="achieved sparsity, %", yscale="log")
        axes.legend()
    figure.axes[0].set_ylabel("perplexity")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=2, help="windows of the evaluation text")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.65])
    parser.add_argument("--step", type=float, default=0.015, help="of the greedy search")
    parser.add_argument("--search-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparsity")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/lutjax/sparsity", help="calibration"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)

    model, params, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    apply_fn = lutjax.lift(model.apply)
    run = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    ids = tokenizer.encode(calibration_text(), add_special_tokens=False)
    calibration = windows(ids, 512, 8)
    evaluation = windows(
        tokenizer.encode(evaluation_text(), add_special_tokens=False), 512, args.chunks
    )
    histograms = {
        score: quantiles(run, params, calibration[:, None], score, args.cache / f"{score}.json")
        for score in ("magnitude", "wina")
    }
    tokens = jnp.asarray(calibration[:1, : args.search_tokens])
    fn, blocks, x = decoder_blocks(model.config, params, tokens)
    search = greedy_search(
        fn,
        blocks,
        x,
        histograms["magnitude"],
        limit=0.65,
        step=args.step,
        save=args.out / "greedy_search.json",
        progress=True,
    )

    file = args.out / "sparsity.json"
    fresh = {"chunks": args.chunks, "baseline": {}, "runs": {}}
    results = json.loads(file.read_text()) if file.exists() else fresh
    if results["chunks"] != args.chunks:
        raise SystemExit(f"{file} has {results['chunks']} chunks; delete it to start anew")
    # Group 32 in steps of the Q4_1 file would be exact and prove nothing; NF4 has a real error.
    variants = {"dense": params, "4-bit": lutjax.quantize(params, bits=4, group_size=64)}
    jobs = [(w, m, t) for w in variants for t in args.targets for m in METHODS]
    for weights, method, target in tqdm(jobs, unit="run"):
        if weights not in results["baseline"]:
            found = perplexity(apply_fn, variants[weights], evaluation)
            results["baseline"][weights] = found.perplexity
        name = f"{weights} {method} {target}"
        if name in results["runs"]:
            continue
        score = "wina" if method == "wina" else "magnitude"
        if method == "greedy":
            plan = plan_greedy(params, histograms[score], search, target)
        else:
            plan = plan_uniform(params, histograms[score], target)
        start = time.time()
        plan = recalibrate(run, params, plan, calibration[:2, None])
        gated = sparsify(variants[weights], plan)
        found = perplexity(apply_fn, gated, evaluation)
        achieved = measure_sparsity(run, gated, evaluation[:, None])
        results["runs"][name] = {
            "weights": weights,
            "method": method,
            "target": target,
            "perplexity": found.perplexity,
            "achieved": achieved.overall,
            "seconds": time.time() - start,
        }
        tqdm.write(f"{name:<22} perplexity {found.perplexity:8.3f}  {achieved.overall:.3f} sparse")
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(file)
        if weights == "dense" and target == 0.5:
            plan.plot(args.out / f"plan_{method}_50.png")
    plot(results, args.out / "sparsity.png")
    for weights, method, target in jobs:
        r = results["runs"][f"{weights} {method} {target}"]
        base = results["baseline"][weights]
        print(
            f"{weights:<6} {method:<8} {target:.2f}  perplexity {r['perplexity']:8.3f} "
            f"({np.log(r['perplexity'] / base):+.3f} nats)  achieved {r['achieved']:.3f}"
        )


if __name__ == "__main__":
    main()
