"""Weights whose columns the compiler splits over devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.virtual_devices import environment


def test_columns_stay_where_they_are():
    done = subprocess.run(
        [sys.executable, "split_columns.py"],
        cwd=Path(__file__).parent,
        env=environment(4),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "PASSED"
