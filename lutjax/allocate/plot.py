"""A picture of a plan: bits of each matrix over the depth of the model."""

from __future__ import annotations

import collections
import os
import re

from lutjax.allocate.plan import Plan, kind_of

_COLORS = ("#4c566a", "#5e81ac", "#88c0d0", "#2a9d8f", "#e9c46a", "#e76f51", "#b48ead")


def plot_plan(plan: Plan, path: str | os.PathLike, title: str = "") -> None:
    """Draws bits a weight of each matrix over its layer, a line for each kind (needs matplotlib).

    Args:
      plan: The plan.
      path: The PNG, PDF or SVG file to write.
      title: Stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for place, choice in enumerate(plan.choices):
        layer = re.search(r"/(\d+)/", f"/{choice.matrix.path}/")
        depth = int(layer[1]) if layer else place
        lines[kind_of(choice.matrix.path)].append((depth, choice.bits_per_weight))
    figure = Figure(figsize=(9, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (kind, points) in enumerate(lines.items()):
        depths, bits = zip(*sorted(points), strict=True)
        offset = 0.012 * (i - len(lines) / 2)  # so that equal lines stay visible
        axes.plot(
            depths,
            [b + offset for b in bits],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            color=_COLORS[i % len(_COLORS)],
            label=kind,
        )
    axes.axhline(plan.bits_per_weight, color="#c0c5ce", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("bits a weight")
    axes.set_title(title or f"{plan.bits_per_weight:.3f} bits a weight ({plan.solver})", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e9f0")
    axes.set_axisbelow(True)
    figure.savefig(path)
