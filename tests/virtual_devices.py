"""The environment of a process whose CPU is several devices; they share few cores."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600",
        # Devices wait for each other in threads; with as many as cores they can wait forever.
        "PJRT_NPROC": "32",
    }
