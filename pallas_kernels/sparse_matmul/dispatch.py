"""Which implementation computes a sparse product, for each platform it may be lowered for."""

from __future__ import annotations

import importlib
from typing import Any

import jax

from pallas_kernels.lut_matmul.dispatch import compiling_for, disabled

IMPLEMENTATIONS = ("reference", "masked", "xla", "cpu_native", "pallas_triton", "mosaic_tpu")

# Best first. The last of each list supports everything.
_PREFERENCE = {
    "cpu": ("cpu_native", "xla", "masked"),
    "cuda": ("pallas_triton", "masked"),
    "tpu": ("mosaic_tpu", "masked"),
}
_OTHER_PLATFORMS = "masked"
_KERNEL_PLATFORM = {"cpu_native": "cpu", "pallas_triton": "cuda", "mosaic_tpu": "tpu"}


def backend(name: str) -> Any:
    """The backend module, imported on first use, or the reason why it cannot be imported.

    A module offers ``supports(x, weight, thresholds)``, which looks at shapes and
    dtypes and returns None or the reason against, and ``sparse_matmul`` with those arguments.
    """
    try:
        return importlib.import_module(f"pallas_kernels.sparse_matmul.{name}")
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def reason_against(name: str, arrays: tuple) -> str | None:
    """Why the named implementation cannot compute this product, or None if it can."""
    module = backend(name)
    return module if isinstance(module, str) else module.supports(*arrays)


def reason_against_here(name: str, arrays: tuple) -> str | None:
    """Like :func:`reason_against`, and the platform must be the right one."""
    platform = _KERNEL_PLATFORM.get(name)
    if platform is not None and not compiling_for(platform):
        return f"it is a kernel for {platform} and the default backend is {jax.default_backend()!r}"
    return reason_against(name, arrays)


def best_per_platform(arrays: tuple) -> tuple[dict[str, str], str]:
    """The preferred implementation of every known platform, and the one for all others.

    Kernels that ``PALLAS_KERNELS_DISABLE`` names are left out, as in ``lut_matmul``.
    """
    without = disabled()

    def best(names: tuple[str, ...]) -> str:
        left = (name for name in names if name not in without)
        return next(name for name in left if reason_against(name, arrays) is None)

    preference: dict[str, tuple[str, ...]] = dict(_PREFERENCE)
    if not compiling_for("cpu"):  # do not build the native library for a fall back nobody runs
        preference["cpu"] = ("masked",)
    return {platform: best(names) for platform, names in preference.items()}, _OTHER_PLATFORMS
