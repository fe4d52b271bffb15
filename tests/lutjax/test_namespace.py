"""What ``import lutjax`` shows."""

import subprocess
import sys

PROGRAM = """
import sys
import lutjax
assert "flax" not in sys.modules  # takes a second to import
names = dir(lutjax)
assert {"load", "quantize", "optim", "io", "evaluate"} <= set(names) and "importlib" not in names
for name in names:
    getattr(lutjax, name)
assert callable(lutjax.lift) and callable(lutjax.io.read_params) and callable(lutjax.optim.galore)
"""


def test_names_are_there_and_imported_on_first_use():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
