"""A picture of a plan: bits of each matrix over the depth of the model."""

from __future__ import annotations

import os
import re

import numpy as np

from lutjax.allocate.plan import Plan, kind_of


def plot_plan(plan: Plan, path: str | os.PathLike, title: str = "") -> None:
    """Draws bits a weight as colours: a row for each kind of matrix, a column for each layer.

    Args:
      plan: The plan.
      path: The PNG, PDF or SVG file to write (needs matplotlib).
      title: Stands above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind_of(choice.matrix.path) for choice in plan.choices))
    places = [_layer(choice.matrix.path) for choice in plan.choices]
    layers = sorted(set(places))
    bits = np.full((len(kinds), len(layers)), np.nan)
    for choice, place in zip(plan.choices, places, strict=True):
        row, column = kinds.index(kind_of(choice.matrix.path)), layers.index(place)
        bits[row, column] = choice.bits_per_weight
    figure = Figure(
        figsize=(3 + max(5.0, 0.11 * len(layers)), 1.4 + 0.32 * len(kinds)),
        dpi=160,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(bits, aspect="auto", cmap="viridis_r", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    axes.set_xlabel("layer")
    axes.set_title(title or f"{plan.bits_per_weight:.3f} bits a weight ({plan.solver})", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="bits a weight", pad=0.01)
    figure.savefig(path)


def _layer(path: str) -> int:
    """The first number in a path; 0 if it has none."""
    found = re.search(r"/(\d+)/", f"/{path}/")
    return int(found[1]) if found else 0
