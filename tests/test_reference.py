"""The HTML reference has an entry for everything public."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs/reference.py"


def test_everything_public_has_an_entry(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", SCRIPT, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = re.findall(r'^    "([\w.]+)",$', SCRIPT.read_text(), re.MULTILINE)
    assert len(modules) > 20
    for name in modules:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text()
        for public in getattr(importlib.import_module(name), "__all__", ()):
            whole = (tmp_path / f"{name.replace('.', '/')}/{public}.html").exists()
            assert whole or f'id="{public}"' in page, f"{name}.{public}"
