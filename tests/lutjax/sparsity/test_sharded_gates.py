"""Gated weights on eight virtual devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_eight_devices():
    program = Path(__file__).with_name("eight_devices.py")
    path = os.pathsep.join([str(program.parents[3]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert process.returncode == 0 and "PASSED" in process.stdout, process.stdout + process.stderr
