"""Gated weights on eight virtual devices, in a process of their own."""

import subprocess
import sys
from pathlib import Path

from tests.virtual_devices import environment


def test_eight_devices():
    program = Path(__file__).with_name("eight_devices.py")
    process = subprocess.run(
        [sys.executable, program],
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert process.returncode == 0 and "PASSED" in process.stdout, process.stdout + process.stderr
