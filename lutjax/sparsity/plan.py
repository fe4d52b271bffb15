"""A sparsity plan: which threshold for which weight; prints, plots and saves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lutjax.calibrate.activations import Score
from lutjax.files import json_by_line, replace_file

_FORMAT = "lutjax sparsity plan 1"


@dataclasses.dataclass(frozen=True)
class Gate:
    """The gate of one weight.

    Attributes:
      threshold: A number; or, for stacked weights, a (nested) tuple of one for each batch entry.
      sparsity: The share of activations it ignores on the calibration text, in the same form; None
        if it is not known.
      shape: Logical shape of the weight.
    """

    threshold: Any
    sparsity: Any
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class SparsityPlan:
    """What :func:`lutjax.sparsity.sparsify` does to each weight.

    Attributes:
      method: How the thresholds were chosen, for people.
      target: The share of weights to skip, or None.
      gates: By parameter path.
      score: What is compared with a threshold: ``"magnitude"`` |x|, or ``"wina"`` |x| times the
        norm of the weight's row.

    >>> print(SparsityPlan("uniform", 0.5, {"mlp/kernel": Gate(0.25, 0.5, (4, 2))}))
    uniform, target 50.0 %, expected 50.0 % of 8 weights, gate |x| > t
    weight      sparsity  threshold
    mlp/kernel    50.0 %       0.25
    """

    method: str
    target: float | None
    gates: Mapping[str, Gate]
    score: Score = "magnitude"

    @property
    def sparsity(self) -> float | None:
        """The share of all gated weights that meet ignored activations; None if not known."""
        if any(gate.sparsity is None for gate in self.gates.values()):
            return None
        total = sum(gate.size for gate in self.gates.values())
        return sum(float(np.mean(g.sparsity)) * g.size for g in self.gates.values()) / total

    def __str__(self) -> str:
        """A line for each weight."""
        size = sum(gate.size for gate in self.gates.values())
        target = "" if self.target is None else f", target {100 * self.target:.1f} %"
        expected = "" if self.sparsity is None else f", expected {100 * self.sparsity:.1f} %"
        gate = "|x| > t" if self.score == "magnitude" else "|x|·norm > t"
        width = max([len(path) for path in self.gates] + [len("weight")])
        lines = [f"{self.method}{target}{expected} of {size:,} weights, gate {gate}"]
        lines.append(f"{'weight':<{width}}  sparsity  threshold")
        for path, g in self.gates.items():
            share = "?" if g.sparsity is None else f"{100 * float(np.mean(g.sparsity)):.1f} %"
            lines.append(f"{path:<{width}}  {share:>8}  {float(np.mean(g.threshold)):>9.4g}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the sparsity of every projection over depth; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, points in self.over_depth().items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="block", ylabel="share of ignored activations", ylim=(0, 1))
        if self.sparsity is not None:
            axes.axhline(self.sparsity, color="gray", linestyle=":", label="all weights")
        axes.set_title(f"{self.method}" + ("" if self.target is None else f", {self.target:.0%}"))
        axes.legend(fontsize=8, ncols=2)
        figure.savefig(path, dpi=120)

    def over_depth(self) -> dict[str, list[tuple[int, float]]]:
        """For each kind of projection, pairs of block number and sparsity, the mean of experts."""
        found: dict[str, list[tuple[int, float]]] = {}
        for path, gate in self.gates.items():
            if gate.sparsity is None:
                continue
            numbers = re.findall(r"(?:^|/)(\d+)(?=/|$)", path)
            name = re.sub(r"(^|/)\d+(?=/|$)", r"\1*", path)
            values = np.asarray(gate.sparsity, np.float64)
            if numbers:
                points = [(int(numbers[0]), float(values.mean()))]
            else:  # blocks are stacked on the first axis
                points = [(i, float(value.mean())) for i, value in enumerate(np.atleast_1d(values))]
            found.setdefault(name, []).extend(points)
        return {name: sorted(points) for name, points in found.items()}

    def to_json(self) -> str:
        """The plan as JSON, a line for each weight, to read, edit and load again."""
        header = {
            "format": _FORMAT,
            "method": self.method,
            "target": self.target,
            "score": self.score,
        }
        gates = {path: dataclasses.asdict(gate) for path, gate in self.gates.items()}
        return json_by_line(header, "gates", gates)

    def save(self, path: str | os.PathLike) -> None:
        """Writes :meth:`to_json`, at once."""
        replace_file(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> SparsityPlan:
        """Reads what :meth:`to_json` wrote.

        Raises:
          ValueError: If the text is no sparsity plan.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r} instead of {_FORMAT!r}")
            if data["score"] not in get_args(Score):
                raise ValueError(f"score {data['score']!r} is neither 'magnitude' nor 'wina'")
            gates = {path: _gate(fields) for path, fields in data["gates"].items()}
            return cls(data["method"], data["target"], gates, data["score"])
        except KeyError as error:
            raise ValueError(f"not a sparsity plan: it has no {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a sparsity plan: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> SparsityPlan:
        """Reads a plan from a JSON file.

        Raises:
          ValueError: If it is none.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def as_tuple(values: np.ndarray) -> Any:
    """A number, or nested tuples of numbers."""
    return values.item() if values.ndim == 0 else tuple(as_tuple(v) for v in values)


def _gate(fields: dict) -> Gate:
    gate = Gate(**fields)
    threshold = np.asarray(gate.threshold, np.float64)
    if not (threshold >= 0).all():
        raise ValueError(f"threshold {gate.threshold} must be 0 or positive")
    known = gate.sparsity is not None
    sparsity = as_tuple(np.asarray(gate.sparsity, np.float64)) if known else None
    return Gate(as_tuple(threshold), sparsity, tuple(int(s) for s in gate.shape))
