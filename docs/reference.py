"""Writes the reference of the public functions and classes as HTML (`make docs`).

    python docs/reference.py [FOLDER]

Everything is from the docstrings; open FOLDER/index.html.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

MODULES = (
    "lutjax",
    "lutjax.adapters",
    "lutjax.allocate",
    "lutjax.arrays",
    "lutjax.calibrate",
    "lutjax.codebooks",
    "lutjax.evaluate",
    "lutjax.io",
    "lutjax.linear_maps",
    "lutjax.models",
    "lutjax.optim",
    "lutjax.packing",
    "lutjax.paths",
    "lutjax.rotation",
    "lutjax.sparsity",
    "lutjax.transforms",
    "pallas_kernels.layout",
    "pallas_kernels.lut_matmul",
    "pallas_kernels.self_check",
    "pallas_kernels.sparse_matmul",
    "train.cyclic_precision",
    "train.finetune",
    "train.pretrain",
    "train.tasks",
    "train.ttt",
)


def main(folder: Path) -> None:
    """Writes a page for each module and an index."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):  # what is imported on first use, too
            setattr(module, public, getattr(module, public))
    # An annotation that it cannot look up is shown as it is written.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    pdoc.render.configure(docformat="google", math=True, show_source=False)
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"wrote {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
