"""The examples name what exists; the notebook is one that ran."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OURS = ("lutjax", "pallas_kernels", "train")


def code(file: Path) -> list[str]:
    if file.suffix == ".py":
        return [file.read_text()]
    cells = json.loads(file.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def imported(source: str) -> list[tuple[str, str | None]]:
    """Modules of ours that are imported, with the names that are taken from them."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(str(node.module), alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in OURS]


@pytest.mark.parametrize(
    "file", sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]), ids=lambda file: file.name
)
def test_what_examples_import_exists(file):
    names = [pair for source in code(file) for pair in imported(source)]
    assert names
    for module, name in names:
        assert name is None or hasattr(importlib.import_module(module), name), (module, name)


def test_the_tour_shows_what_it_printed():
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
    assert len(outputs) > 5
    assert all(outputs)
    assert all(output["output_type"] != "error" for cell in outputs for output in cell)


def test_the_trajectories_of_duality_lie_on_each_other(tmp_path):
    command = [sys.executable, EXAMPLES / "duality.py", "--output", tmp_path / "plot.png"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    gaps = re.findall(r"largest difference of a weight, (\w+): (\S+)", printed)
    assert [name for name, _ in gaps] == ["adapters", "switched"]
    assert all(float(gap) < 1e-12 for _, gap in gaps)  # float64
    assert (tmp_path / "plot.png").stat().st_size > 10_000
