"""Perplexity of SmolLM2-135M over activation sparsity: uniform, greedy and WINA thresholds.

    python benchmarks/sparsity.py

Calibrates on docstrings of Python's standard library and evaluates on its help topics, all tokens
sparse, on the dense weights and on 4-bit ones; methods are compared window by window. Also runs the
thresholds of an independent implementation (tests/data/smollm2/teal.json) on its windows. Every
result is written at once, so a killed run goes on where it was. Writes sparsity.json, sparsity.md,
sparsity.png, the greedy search and plan plots to benchmarks/results/sparsity; the calibration goes
to a cache. One core takes about an hour.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import sysconfig
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.calibrate import ActivationQuantiles, activation_quantiles
from lutjax.calibrate.hashing import content_hash
from lutjax.cli.models import evaluation_text
from lutjax.evaluate import windows
from lutjax.files import replace_file
from lutjax.io import demo_model_path
from lutjax.models.blockwise import decoder_blocks
from lutjax.sparsity import (
    SparsityPlan,
    greedy_search,
    measure_sparsity,
    plan_greedy,
    plan_thresholds,
    plan_uniform,
    recalibrate,
    sparsify,
)

METHODS = ("uniform", "greedy", "wina")
WEIGHTS = ("dense", "4-bit")
MODULES = """
argparse collections/__init__ contextlib dataclasses difflib doctest email/message fractions
functools heapq inspect ipaddress logging/__init__ optparse pathlib pdb random shutil statistics
string subprocess tarfile textwrap threading turtle typing unittest/case unittest/mock uuid zipfile
"""
OUTSIDE = Path(__file__).parents[1] / "tests/data/smollm2"
INPUTS = {
    "attn_in": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "o_in": ("self_attn/o_proj",),
    "mlp_in": ("mlp/gate_proj", "mlp/up_proj"),
    "down_in": ("mlp/down_proj",),
}


def calibration_text() -> str:
    """Docstrings of the standard library: prose and code, none of it in the help topics."""
    found = []
    for name in MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        found += [ast.get_docstring(node) for node in nodes]
    return "\n\n".join(text for text in found if text)


class Study:
    """The model, its texts, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Loads the model and the results of earlier runs."""
        self.args = args
        self.model, self.params, tokenizer = lutjax.load(demo_model_path())
        self.logits = jax.jit(lutjax.lift(self.run))
        ids = tokenizer.encode(calibration_text(), add_special_tokens=False)
        self.calibration = windows(ids, 512, 8)
        inputs = content_hash((self.params, self.calibration))
        self.cache = args.cache / f"{inputs[:16]}-{args.step}-{args.search_tokens}"
        self.cache.mkdir(parents=True, exist_ok=True)
        ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
        self.evaluation = windows(ids, 512, args.windows)
        # Group 32 in steps of the Q4_1 file would be exact and prove nothing; NF4 has a real error.
        self.variants = {
            "dense": self.params,
            "4-bit": lutjax.quantize(self.params, bits=4, group_size=64),
        }
        self.file = args.out / "sparsity.json"
        fresh = {"windows": args.windows, "runs": {}}
        self.results = json.loads(self.file.read_text()) if self.file.exists() else fresh
        if self.results.get("windows") != args.windows:
            raise SystemExit(f"{self.file} was made with other windows; delete it to start anew")

    def run(self, params: Any, tokens: Any) -> Any:
        """Logits `[B, T, V]`."""
        return self.model.apply({"params": params}, tokens)

    def save(self) -> None:
        """Writes the results, the raw ones at once."""
        replace_file(self.file, json.dumps(self.results, indent=1) + "\n")
        (self.args.out / "sparsity.md").write_text(markdown(self.results))

    def quantiles(self, score: str) -> ActivationQuantiles:
        """Of the dense model, from the cache if they are there."""
        path = self.cache / f"{score}.json"
        if not path.exists():
            batches = self.calibration[:, None]
            found = activation_quantiles(self.run, self.params, batches, score=score, progress=True)
            found.save(path)
        return ActivationQuantiles.load(path)

    def plan(self, weights: str, method: str, target: float) -> SparsityPlan:
        """Thresholds for the activations that the plan itself leaves, from the cache if there.

        How much of which input is ignored is found on the dense weights.
        """
        path = self.cache / f"plan_{weights}_{method}_{target}.json"
        if path.exists():
            return SparsityPlan.load(path)
        quantiles = self.quantiles("wina" if method == "wina" else "magnitude")
        if method == "greedy":
            tokens = jnp.asarray(self.calibration[:1, : self.args.search_tokens])
            fns, blocks, x = decoder_blocks(self.model.config, self.params, tokens)
            search = greedy_search(
                fns,
                blocks,
                x,
                quantiles,
                limit=max(self.args.targets),
                step=self.args.step,
                cache=self.args.out / "greedy_search.json",
                progress=True,
            )
            plan = plan_greedy(self.params, quantiles, search, target)
        else:
            plan = plan_uniform(self.params, quantiles, target)
        plan = recalibrate(self.run, self.variants[weights], plan, self.calibration[::2, None])
        plan.save(path)
        return plan

    @functools.cached_property
    def dense_logits(self) -> list[jax.Array]:
        """Of every evaluation window, `[T, V]`, without sparsity and quantisation."""
        return [self.logits(self.params, window[None])[0] for window in self.evaluation]

    def scores(self, params: Any) -> dict:
        """For each window: the negative log-likelihood and the divergence from the dense model."""
        pairs = [
            compare(self.logits(params, window[None])[0], dense, window)
            for window, dense in zip(self.evaluation, self.dense_logits, strict=True)
        ]
        nll, kl = np.asarray(pairs, np.float64).T.tolist()
        return {"window_nll": nll, "window_kl": kl}

    def sparse(self, weights: str, method: str, target: float) -> dict:
        """One point of a curve."""
        plan = self.plan(weights, method, target)
        if weights == "dense" and target == 0.5:
            plan.plot(self.args.out / f"plan_{method}_50.png")
        gated = sparsify(self.variants[weights], plan)
        achieved = measure_sparsity(self.run, gated, self.evaluation[:4, None])
        return {**self.scores(gated), "achieved": achieved.overall}

    def outside(self, share: str) -> dict:
        """The thresholds of an independent implementation, on its windows."""
        given = json.loads((OUTSIDE / "teal.json").read_text())
        thresholds = {}
        for key, by_share in given["thresholds"].items():
            layer, kind = key.split(".")
            for name in INPUTS[kind]:
                thresholds[f"layers/{layer}/{name}/kernel"] = by_share[share]
        gated = sparsify(self.params, plan_thresholds(self.params, thresholds))
        tokens = np.load(OUTSIDE / "windows.npz")["windows"]
        logits = (self.logits(gated, window[None])[0] for window in tokens)
        nll = [compare(y, y, window)[0] for y, window in zip(logits, tokens, strict=True)]
        return {"here": float(np.exp(np.mean(nll))), "there": given["perplexity"][share]}


@jax.jit
def compare(logits: jax.Array, dense: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean negative log-likelihood and mean KL(dense ‖ model) of a window's predictions."""
    log_p, log_q = jax.nn.log_softmax(dense[:-1]), jax.nn.log_softmax(logits[:-1])
    nll = -jnp.take_along_axis(log_q, tokens[1:, None], axis=1)
    return jnp.mean(nll), jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b in nats a token, and its standard error over windows."""
    values = np.asarray(a) - np.asarray(b)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def markdown(results: dict) -> str:
    """Two tables, and what the outside thresholds give."""
    runs = results["runs"]
    targets = sorted({name.split()[2] for name in runs if name.startswith("dense ")})
    lines = [f"SmolLM2-135M, all tokens sparse, {results['windows']} windows of 512 tokens."]
    titles = {"window_nll": "Perplexity", "window_kl": "KL from the dense model, nats a token"}
    for field, title in titles.items():
        columns = ["weights", "target", *METHODS, "greedy − uniform", "wina − uniform", "achieved"]
        lines += ["", f"{title}; differences in nats a token, ± their standard error:", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for weights, target in itertools.product(WEIGHTS, targets):
            row = [runs.get(f"{weights} {method} {target}") for method in METHODS]
            if not all(row):
                continue
            values = [r[field] for r in row]
            means = [np.mean(v) for v in values]
            cells = [weights, f"{float(target):.0%}"]
            cells += [f"{np.exp(m) if field == 'window_nll' else m:.3f}" for m in means]
            pairs = [difference(v, values[0]) for v in values[1:]]
            cells += [f"{mean:+.4f} ± {error:.4f}" for mean, error in pairs]
            achieved = [100 * r["achieved"] for r in row]
            cells.append(f"{min(achieved):.2f}–{max(achieved):.2f} %")
            lines.append("| " + " | ".join(cells) + " |")
    without = [f"{np.exp(np.mean(runs[w]['window_nll'])):.3f} {w}" for w in WEIGHTS if w in runs]
    lines += ["", f"Perplexity without sparsity: {', '.join(without)}."]
    for name in ("outside 0.25", "outside 0.5"):
        if name in runs:
            here, there = runs[name]["here"], runs[name]["there"]
            lines.append(
                f"With the outside thresholds for {float(name.split()[1]):.0%}: {here:.3f}; "
                f"{there:.3f} there ({100 * (here / there - 1):+.2f} %)."
            )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    runs = results["runs"]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, weights in zip(figure.subplots(1, 2, sharey=True), WEIGHTS, strict=True):
        for method in METHODS:
            points = sorted(
                (100 * r["achieved"], np.exp(np.mean(r["window_nll"])))
                for name, r in runs.items()
                if name.startswith(f"{weights} {method} ")
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        if weights in runs:
            without = np.exp(np.mean(runs[weights]["window_nll"]))
            axes.axhline(without, color="gray", linestyle=":", label="no sparsity")
        axes.set(title=f"{weights} weights", xlabel="achieved sparsity, %", yscale="log")
        axes.legend()
    figure.axes[0].set_ylabel("perplexity")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="of the evaluation text")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=[0.25, 0.3, 0.4, 0.5, 0.6, 0.65]
    )
    parser.add_argument("--step", type=float, default=0.005, help="of the greedy search")
    parser.add_argument("--search-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparsity")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/lutjax/sparsity", help="calibration"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args)
    jobs = {}
    for weights, params in study.variants.items():
        jobs[weights] = functools.partial(study.scores, params)
        for target, method in itertools.product(args.targets, METHODS):
            jobs[f"{weights} {method} {target}"] = functools.partial(
                study.sparse, weights, method, target
            )
    jobs |= {
        f"outside {share}": functools.partial(study.outside, share) for share in ("0.25", "0.5")
    }
    for name, job in tqdm(jobs.items(), unit="run"):
        if name not in study.results["runs"]:
            study.results["runs"][name] = job()
            study.save()
    plot(study.results, args.out / "sparsity.png")
    print(markdown(study.results))


if __name__ == "__main__":
    main()
