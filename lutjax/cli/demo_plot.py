"""The demo's plot: size against perplexity, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lutjax.cli.demo import DemoResult

_COLORS = ("#4c566a", "#5e81ac", "#2a9d8f", "#e76f51", "#b48ead")
_TEXT = "#2e3440"


def write_plot(results: Sequence[DemoResult], path: Path) -> None:
    """Draws the results as a PNG.

    Args:
      results: what was measured, the dense model first.
      path: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    quality, speed = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(results))]

    sizes = [r.megabytes for r in results]
    values = [r.perplexity for r in results]
    quality.axhline(results[0].perplexity, color="#c0c5ce", linewidth=1, linestyle="--", zorder=1)
    quality.scatter(sizes, values, s=90, c=colors, zorder=3, edgecolors="white", linewidths=1)
    for result, color in zip(results, colors, strict=True):
        quality.annotate(
            f"{result.name}\n{result.perplexity:.2f}",
            (result.megabytes, result.perplexity),
            xytext=(0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
            fontweight="bold",
        )
    quality.set_xscale("log")
    quality.set_yscale("log")
    quality.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
    quality.set_ylim(min(values) / 1.12, max(values) * 1.45)
    ticks = [t for t in (25, 50, 100, 200, 400, 800) if min(sizes) / 1.35 < t < max(sizes) * 1.35]
    quality.set_xticks(ticks, [str(t) for t in ticks])
    marks = [t for t in (10, 15, 20, 30, 40, 60, 80) if min(values) / 1.12 < t < max(values) * 1.45]
    quality.set_yticks(marks, [str(t) for t in marks])
    quality.minorticks_off()
    quality.set_xlabel("the whole model, MB")
    quality.set_ylabel("perplexity (lower is better)")
    quality.set_title("Size and quality", loc="left", fontweight="bold")

    rows = range(len(results))
    bars = speed.barh(rows, [r.tokens_per_second for r in results], color=colors, height=0.62)
    speed.bar_label(bars, fmt="%.1f", padding=4, fontsize=9, color=_TEXT)
    speed.set_yticks(rows, [f"{r.name}  ({r.bits_per_weight:.2f} b/w)" for r in results])
    speed.invert_yaxis()
    speed.set_xlim(0, 1.15 * max(r.tokens_per_second for r in results))
    speed.set_xlabel("tokens a second, batch 1 (higher is better)")
    speed.set_title("Decoding speed", loc="left", fontweight="bold")

    for axes in (quality, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_TEXT, length=0)
        axes.grid(axis="both" if axes is quality else "x", color="#e5e9f0", zorder=0)
        axes.set_axisbelow(True)
    figure.suptitle("SmolLM2-135M-Instruct as lookup-table weights", fontweight="bold")
    figure.savefig(path)
