"""The table and the plot of `benchmarks/lq_lora.py`, from its JSON file.

python benchmarks/lq_lora_report.py benchmarks/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lutjax.files import replace_file

METHODS = {"nf": "plain NF", "loftq": "LoftQ", "lq": "LQ", "lq_fisher": "LQ + Fisher"}
COLORS = {"nf": "#4c566a", "loftq": "#e9c46a", "lq": "#5e81ac", "lq_fisher": "#e76f51"}
STAGES = ("before", "after")
ORDER = tuple(
    f"{method}/{solver}"
    for solver in ("uniform", "ilp")
    for method in METHODS
    if (method, solver) != ("loftq", "ilp")
)


def write(results: dict[str, Any], output: Path) -> None:
    """Writes the JSON file and the table."""
    replace_file(output / "lq_lora.json", json.dumps(results, indent=2) + "\n")
    replace_file(output / "lq_lora.md", report(results))


def report(results: dict[str, Any]) -> str:
    """Two tables, before and after training, and how they were made."""
    settings, dense, rows = results["settings"], results["dense"], results["rows"]
    tried = results["learning_rates"]
    text = (
        f"Perplexity of SmolLM2-135M-Instruct on {settings['evaluated']} held-out windows of "
        f"{settings['tokens']} tokens, the stored bits a weight of the quantised parts in brackets "
        f"(low-rank parts of rank {settings['rank']} are not counted, as in the paper). Fisher "
        f"information from {settings['samples']} samples of {settings['sample_tokens']} tokens; "
        f"training of the low-rank parts alone for {settings['steps']} steps of 1 x "
        f"{settings['trained_tokens']} tokens, all on other windows of the same text. Each "
        "method has the learning rate, with cosine decay, that is best for its uniform plan of "
        "3.25 bits (below). Plain NF is trained with a new adapter of the same rank (QLoRA). "
        "Uniform plans of all methods are those of plain NF; where rows repeat, more bits for the "
        "scales would not lower the error by 1 %."
    )
    parts = [text, ""]
    for stage in dense:
        parts += [f"{stage.capitalize()} training (dense: {dense[stage]:.2f}):", ""]
        parts += [*_table(rows, stage), ""]
    if tried:
        parts += ["After training, uniform plans of 3.25 bits, by learning rate:", ""]
        parts += [*_rates(tried), ""]
    return "\n".join(parts)


def _rates(tried: dict[str, dict[str, float]]) -> list[str]:
    rates = list(next(iter(tried.values())))
    lines = ["| method | " + " | ".join(rates) + " |", "|---|" + "---|" * len(rates)]
    for method, found in tried.items():
        best = min(found.values())
        cells = [f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in found.values()]
        lines.append(f"| {METHODS.get(method, method)} | " + " | ".join(cells) + " |")
    return lines


def _table(rows: dict[str, Any], stage: str) -> list[str]:
    shown = _shown(rows, stage)
    lines = [
        "| budget | " + " | ".join(_title(name) for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for budget, cells in rows.items():
        best = min(
            (cells[name][stage] for name in shown if stage in cells.get(name, {})), default=None
        )
        texts = []
        for name in shown:
            if stage not in cells.get(name, {}):
                texts.append("")
                continue
            value, bits = cells[name][stage], cells[name]["bits_per_weight"]
            mark = "**" if value == best else ""
            number = f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
            texts.append(f"{mark}{number}{mark} ({bits:.2f})")
        lines.append(f"| {budget} | " + " | ".join(texts) + " |")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Perplexity over the budget, before and after training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, dense = results["rows"], results["dense"]
    figure = Figure(figsize=(10, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, stage in zip(figure.subplots(1, 2, sharey=True), STAGES, strict=True):
        for name in _shown(rows, stage):
            method, solver = name.split("/")
            points = [
                (float(b), c[name][stage]) for b, c in rows.items() if stage in c.get(name, {})
            ]
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=4,
                linestyle="-" if solver == "ilp" else "--",
                color=COLORS[method],
                label=_title(name),
            )
        if stage in dense:
            axes.axhline(dense[stage], color="#c0c5ce", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylim(0.9 * min(dense.values()), 1000)
        axes.set_title(f"{stage} training")
        axes.set_xlabel("budget, bits a weight")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e9f0")
    figure.axes[0].set_ylabel("perplexity (lower is better)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _shown(rows: dict[str, Any], stage: str) -> list[str]:
    return [n for n in ORDER if any(stage in cells.get(n, {}) for cells in rows.values())]


def _title(name: str) -> str:
    method, solver = name.split("/")
    return f"{METHODS[method]}, {solver}"


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = json.loads((directory / "lq_lora.json").read_text())
    write(found, directory)
    plot(found, directory / "lq_lora.png")
