"""The same text and the same tokens for every method: a table and a plot of pretraining runs.

    python examples/compare_optimizers.py --text a.txt b.txt --output runs/compare

Every finished run is kept as JSON, so that an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.pretrain import PretrainConfig, load_corpus, pretrain

METHODS = {
    "adam": "Adam, full rank",
    "galore": "GaLore",
    "one_sided_lora": "one-sided LoRA, merged",
    "flora": "Flora",
    "semi_orthogonal": "semi-orthogonal sketches",
}


def run_all(base: PretrainConfig, seeds: int, output: Path) -> dict[str, list[dict]]:
    output.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(base)
    results: dict[str, list[dict]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name in METHODS:
            config = dataclasses.replace(base, method=name, seed=seed)
            path = output / f"{name}-{seed}.json"
            if not path.exists():
                run = pretrain(config, corpus)
                record = {k: run[k] for k in ("losses", "evaluations", "seconds")}
                path.write_text(json.dumps(record | {"config": dataclasses.asdict(config)}))
                print(name, seed, run["evaluations"][-1][1], flush=True)
            results[name].append(json.loads(path.read_text()))
    return results


def table(results: dict[str, list[dict]]) -> str:
    lines = ["| method | validation loss | perplexity | seeds |", "|---|---|---|---|"]
    for name, runs in results.items():
        final = np.array([run["evaluations"][-1][1] for run in runs])
        spread = f" ± {final.std(ddof=1):.4f}" if len(final) > 1 else ""
        lines.append(
            f"| {METHODS[name]} | {final.mean():.4f}{spread} | {np.exp(final).mean():.2f} "
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
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="1m")
    parser.add_argument("--steps", type=int, default=200)
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
        eval_every=max(1, arguments.steps // 8),
    )
    results = run_all(base, arguments.seeds, arguments.output)
    print(table(results))
    plot(results, arguments.output / "compare_optimizers.png")


if __name__ == "__main__":
    main()
