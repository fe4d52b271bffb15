"""Compiles kernels for hardware that is not there and counts their instructions.

TPU: libtpu dumps the final VLIW bundles. GPU: jax's CUDA plugin compiles for a described H200 and
dumps PTX; ptxas and nvdisasm turn it into SASS. Both read their settings from the environment
before they load, so this module must be imported before any device of theirs is touched.
"""

from __future__ import annotations

import atexit
import collections
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
DUMP = tempfile.mkdtemp(prefix="kernels_")
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)  # gigabytes
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
os.environ.update(MOSAIC_GPU_DUMP_PTX="1", MOSAIC_GPU_DUMP_TO=DUMP)
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=ptx"

import jax  # noqa: E402
import pytest  # noqa: E402
from hazards import Instruction, hazards  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractMesh, SingleDeviceSharding  # noqa: E402

TOPOLOGY = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KIND = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "h200": "NVIDIA H200",
}

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def need(condition: bool, what: str) -> None:
    """Skips without a compiler; fails where CI promised one (``REQUIRE_COMPILERS=1``)."""
    if condition:
        return
    if os.environ.get("REQUIRE_COMPILERS"):
        pytest.fail(f"{what} is missing, and REQUIRE_COMPILERS is set")
    pytest.skip(f"{what} is missing: compiled nothing")


def _find(name: str) -> str | None:
    roots = [p for p in sys.path if p.endswith("site-packages")]
    places = ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin")
    hits = [f"{r}/{p}/{name}" for p in places for r in roots if os.path.exists(f"{r}/{p}/{name}")]
    return hits[0] if hits else None


def need_tpu() -> None:
    need(
        importlib.util.find_spec("libtpu") is not None,
        f"libtpu (pip install 'jax[tpu]=={jax.__version__}')",
    )


def need_gpu() -> None:
    plugin = "jax_plugins" in sys.modules or importlib.util.find_spec("jax_plugins") is not None
    plugin = plugin and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    packages = "--no-deps jax-cuda13-pjrt jax-cuda13-plugin"
    need(plugin, f"jax's CUDA plugin (pip install {packages}, {jax.__version__})")
    need(_find("ptxas") is not None, "ptxas (pip install nvidia-cuda-nvcc)")
    need(_find("nvdisasm") is not None, "nvdisasm (pip install --no-deps triton)")


def need_triton() -> None:
    for name in ("triton", "jax_triton"):
        packages = "--no-deps triton==3.6.0 jax-triton==0.3.1 absl-py"
        need(importlib.util.find_spec(name) is not None, f"{name} (pip install {packages})")
    need_gpu()


def devices(target: str, count: int = 1) -> list:
    """So many devices of one machine; of TPUs there are four (of tpu7x eight halves)."""
    if target == "h200":
        description = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H200, topology=f"1x1x{count}"
        )
    else:
        description = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[target])
    return description.devices[:count]


def abstract(target: str):
    """A context in which tracing believes in the target's device."""
    return abstract_device(KIND[target])


def abstract_device(kind: str):
    """The same for a device by the name that it gives itself."""
    gpu = kind.startswith("NVIDIA")
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=132 if gpu else 1, platform="gpu" if gpu else "tpu"
    )
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def compile_for(target: str, function, *args):
    """Compiles ``function`` for shapes ``args`` on ``target``; the new files of the dump.

    Arguments without a sharding are on one device.
    """
    one = SingleDeviceSharding(devices(target)[0])
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or one), args
    )
    before = set(glob.glob(f"{DUMP}/*"))
    platform = "cuda" if target == "h200" else "tpu"
    with abstract(target):
        compiled = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).compile()
    return compiled, set(glob.glob(f"{DUMP}/*")) - before


def bundles(target: str, function, *args) -> int:
    """VLIW bundles of the largest program that a TPU kernel becomes."""
    _, files = compile_for(target, function, *args)
    report = kernel_report(files, "final_hlo-static-per-bundle-utilization.txt")
    return sum(bool(line.strip()) for line in report.splitlines()[4:])


def kernel_report(files: set[str], end: str) -> str:
    """The dump with that end about the largest program that a TPU kernel became."""
    reports = [f for f in files if f.endswith(end) and "<late" not in f and "-TLP-" not in f]
    with open(max(reports, key=os.path.getsize)) as report:
        return report.read()


class Sass:
    """The machine code of one GPU kernel."""

    def __init__(self, ptx: str, arch: str = "sm_90a"):
        cubin = f"{DUMP}/kernel.cubin"
        ptxas, nvdisasm = _find("ptxas"), _find("nvdisasm")
        assert ptxas is not None and nvdisasm is not None
        run = subprocess.run(
            [ptxas, f"-arch={arch}", "-v", "-o", cubin, ptx], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        self.registers = int(re.findall(r"Used (\d+) registers", run.stderr)[0])
        self.spills = sum(int(s) for s in re.findall(r"(\d+) bytes spill", run.stderr))
        text = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True).stdout
        self.code: list[Instruction] = []
        labels: dict[str, int] = {}
        pending: list[str] = []
        for line in text.splitlines():
            label = re.match(r"\s*(\.L_x?_?\w+):", line)
            pending += [label.group(1)] if label else []
            found = re.search(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*)", line)
            if found:
                address = int(found.group(1), 16)
                labels |= dict.fromkeys(pending, address)
                pending = []
                self.code.append(
                    Instruction(address, found.group(3), found.group(4), bool(found.group(2)))
                )
        self.labels = labels

    @property
    def instructions(self) -> list[tuple[int, str, str]]:
        """Address, opcode and operands of each."""
        return [(one.address, one.opcode, one.operands) for one in self.code]

    def hazards(self) -> list[str]:
        """Accesses to registers that a product still uses."""
        return hazards(self.code, self.labels)

    def registers_asked(self, computing: int) -> int:
        """Registers of a lane slot that all warpgroups ask for, one of which moves memory."""
        found = [
            (o, int(p.split(",")[-1], 16)) for _, o, p in self.instructions if "SETMAXREG" in o
        ]
        (less,) = {n for opcode, n in found if ".DEALLOC" in opcode}
        (more,) = {n for opcode, n in found if ".TRY_ALLOC" in opcode}
        return less + computing * more

    def main_loop(self, product: str = "HGMMA") -> collections.Counter:
        """Opcodes of the smallest loop that multiplies matrices."""
        return collections.Counter(opcode.split(".")[0] for opcode, _ in self._main_loop(product))

    def products_in_flight(self) -> set[int]:
        """How many products the main loop leaves unfinished where it waits for one."""
        waits = [o for opcode, o in self._main_loop() if opcode.startswith("WARPGROUP.DEPBAR")]
        return {int(operands.split(",")[1], 16) for operands in waits}

    def _main_loop(self, product: str = "HGMMA") -> list[tuple[str, str]]:
        loops = []
        for address, opcode, operands in self.instructions:
            target = re.search(r"\((\.L_x?_?\w+)\)", operands) if opcode == "BRA" else None
            if target and self.labels.get(target.group(1), address) < address:
                first = self.labels[target.group(1)]
                loops.append([(o, p) for a, o, p in self.instructions if first <= a <= address])
        multiplying = [loop for loop in loops if any(o.startswith(product) for o, _ in loop)]
        return min(multiplying, key=len)


def sass(function, *args) -> Sass:
    """Compiles a Mosaic GPU kernel for the H200."""
    _, files = compile_for("h200", function, *args)
    return Sass(max((f for f in files if f.endswith(".ptx")), key=os.path.getsize))
