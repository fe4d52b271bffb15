"""The environment of a process whose CPU is several devices; they share few cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return (
        os.environ
        | {
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in `conftest.py`
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={devices}"
            " --xla_cpu_collective_call_terminate_timeout_seconds=600",
            # Devices wait for each other in threads; with as many as cores they can wait forever.
            "PJRT_NPROC": "32",
        }
    )


def printed_json(script: Path, devices: int) -> Any:
    """What a script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
