"""`lutjax doctor`: what this installation can run on this machine, and why not the rest."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Print versions, devices, and which kernels run here or why not.

    The first thing to look at, and to send along, when something is slower than expected.

    For example:

    lutjax doctor
    """

    def run(self) -> None:
        """Prints the report."""
        print("\n".join(report()))


def report() -> list[str]:
    """The lines of the report."""
    import jax

    lines = _versions()
    try:
        devices = jax.devices()
    except Exception as error:  # a broken installation is what this command is for
        return [*lines, f"devices: none, jax cannot start: {type(error).__name__}: {error}"]
    lines += ["devices: " + ", ".join(f"{d.platform} {d.device_kind}" for d in devices)]
    lines += ["", *_native_library()]
    for operation, reasons in (("lut_matmul", _lut_matmul()), ("sparse_matmul", _sparse_matmul())):
        lines += ["", f"{operation}, one row of x, 4096 x 4096, 4 bits:"]
        lines += [f"  {name:<15} {reason}" for name, reason in reasons.items()]
    return lines


def _versions() -> list[str]:
    import importlib.metadata
    import os
    import platform

    names = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "safetensors")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    from lutjax import __version__

    return [
        f"lutjax {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(versions),
        f"cores: {os.cpu_count()}",
    ]


def _native_library() -> list[str]:
    from pallas_kernels import native

    reason = native.availability()
    if reason is not None:
        return [f"C++ kernels: none, products on a CPU run through XLA: {reason}"]
    best, *others = native.instruction_sets()
    return [
        f"C++ kernels: {native.library_path()}",
        f"instruction set: {best} (also there: {', '.join(others)})",
    ]


def _lut_matmul() -> dict[str, str]:
    """For every implementation, whether it runs here, or why not."""
    import jax

    from pallas_kernels.lut_matmul import IMPLEMENTATIONS, dispatch

    static = {"k": 4096, "group_size": 128, "transpose": False}
    arrays = (*_product(), None)
    default, other = dispatch.best_per_platform(arrays, static)
    best = default.get(_platform(jax.default_backend()), other)
    reasons = {n: dispatch.reason_against_here(n, arrays, static) for n in IMPLEMENTATIONS}
    return {name: _said(reason, name == best) for name, reason in reasons.items()}


def _sparse_matmul() -> dict[str, str]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.sparse_matmul import IMPLEMENTATIONS, BlockCodes, dispatch

    x, words, scales, lut = _product()
    weight = BlockCodes(words, scales, lut, None, 4096, 128)
    arrays, splits = (x, weight, jax.ShapeDtypeStruct((1, 1), jnp.float32)), (4096,)
    default, other = dispatch.best_per_platform(arrays, splits)
    best = default.get(_platform(jax.default_backend()), other)
    reasons = {n: dispatch.reason_against_here(n, arrays, splits) for n in IMPLEMENTATIONS}
    return {name: _said(reason, name == best) for name, reason in reasons.items()}


def _platform(backend: str) -> str:
    return {"gpu": "cuda"}.get(backend, backend)


def _said(reason: str | None, is_default: bool) -> str:
    if reason is not None:
        return f"no: {reason.split('; ')[0]}"
    return "runs here, the default" if is_default else "runs here"


def _product() -> tuple[Any, Any, Any, Any]:
    """The shapes of one product: x, words, scales, table."""
    import jax
    import jax.numpy as jnp

    return (
        jax.ShapeDtypeStruct((1, 4096), jnp.float32),
        jax.ShapeDtypeStruct((512, 4, 4096), jnp.uint8),
        jax.ShapeDtypeStruct((32, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 16, 1), jnp.float32),
    )
