"""The same text and the same tokens for every method: a table and a plot of pretraining runs.

    python examples/compare_optimizers.py --output runs/compare

Each method gets the learning rate that served it best in short runs of another seed. Every
finished run is kept as JSON, so that an interrupted comparison goes on where it stopped. The text
is docstrings of installed packages unless files are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lutjax.files import replace_file
from train.checkpoints import differences
from train.pretrain import PretrainConfig, load_corpus, pretrain
from train.text import Corpus, docstrings

DEFAULT_TEXT = ("numpy", "jax", "scipy")

METHODS = {
    "adam": "Adam, full rank",
    "adam_8bit": "Adam, moments in 8 bits",
    "adam_4bit": "Adam, moments in 4 bits",
    "galore": "GaLore",
    "one_sided_lora": "one-sided LoRA, merged",
    "flora": "Flora",
    "semi_orthogonal": "semi-orthogonal sketches",
}
DEFAULT_METHODS = ("adam", "galore", "one_sided_lora", "flora", "semi_orthogonal")


def run(config: PretrainConfig, corpus: Corpus, path: Path) -> dict:
    """One training run; read from `path` if it was finished there before."""
    if not path.exists():
        result = pretrain(config, corpus)
        record = {k: getattr(result, k) for k in ("losses", "evaluations", "seconds")}
        identity = {"config": dataclasses.asdict(config), "corpus": corpus.fingerprint}
        replace_file(path, json.dumps(record | identity))
        print(f"{path.stem}: {result.evaluations[-1][1]:.4f}", flush=True)
    record = json.loads(path.read_text())
    if record["corpus"] != corpus.fingerprint:
        raise ValueError(f"{path} is of another text; use another output directory")
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    differing = differences(record["config"], wanted, path.name)
    if differing:
        raise ValueError(f"{path} is of another run: {differing}; use another output directory")
    return record


def tune(base: PretrainConfig, corpus: Corpus, output: Path) -> float:
    """The best learning rate on a grid of factors of 2, climbed from the base's one."""

    def loss(rate: float) -> float:
        config = dataclasses.replace(base, learning_rate=rate)
        found = run(config, corpus, output / f"tune-{base.method}-{rate:g}.json")
        return found["evaluations"][-1][1]

    best = base.learning_rate
    for factor in (2.0, 0.5):
        while loss(best * factor) < loss(best):
            best *= factor
    return best


def run_all(
    base: PretrainConfig, methods: Sequence[str], seeds: int, tuning_steps: int, output: Path
) -> dict[str, list[dict]]:
    """Every method with its own learning rate, tuned on a seed that the comparison leaves out."""
    output.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(base) if base.text else Corpus.of(docstrings(*DEFAULT_TEXT))
    tuned = {
        name: tune(
            dataclasses.replace(base, method=name, steps=tuning_steps, seed=seeds), corpus, output
        )
        for name in methods
    }
    results: dict[str, list[dict]] = {name: [] for name in methods}
    for seed in range(seeds):
        for name in methods:
            config = dataclasses.replace(base, method=name, seed=seed, learning_rate=tuned[name])
            results[name].append(run(config, corpus, output / f"{name}-{seed}.json"))
    return results


def table(results: dict[str, list[dict]]) -> str:
    lines = [
        "| method | learning rate | validation loss, nats a byte | perplexity | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        final = np.array([run["evaluations"][-1][1] for run in runs])
        spread = f" ± {final.std(ddof=1):.4f}" if len(final) > 1 else ""
        lines.append(
            f"| {METHODS[name]} | {runs[0]['config']['learning_rate']:g} "
            f"| {final.mean():.4f}{spread} | {np.exp(final).mean():.2f} "
            f"| {len(final)} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, runs in results.items():
        curves = np.array([[loss for _, loss in run["evaluations"]] for run in runs])
        steps = [step for step, _ in runs[0]["evaluations"]]
        (line,) = axes.plot(steps, curves.mean(0), label=METHODS[name])
        axes.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="validation loss, nats a byte")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", nargs="+", default=[], help="files; default: docstrings")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS)
    parser.add_argument("--model", default="1m")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tuning-steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    base = PretrainConfig(
        text=tuple(arguments.text),
        model=arguments.model,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        rank=arguments.rank,
        refresh_every=50,
        scale=1.0,
        learning_rate=4e-3,
        eval_every=max(1, arguments.steps // 8),
    )
    results = run_all(
        base, arguments.methods, arguments.seeds, arguments.tuning_steps, arguments.output
    )
    print(table(results))
    plot(results, arguments.output / "compare_optimizers.png")


if __name__ == "__main__":
    main()
