"""`lutjax doctor`: what this installation can run on this machine, and why not the rest."""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pallas_kernels.operation import Operation


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Print versions, devices, and which kernels run here or why not.

    The first thing to look at, and to send along, when something is slower than expected or wrong.

    For example:

    lutjax doctor

    lutjax doctor --check
    """

    check: bool = False
    """Run the kernels on small products, too, and compare them with float64: a minute or two. The
    exit code is 1 if one is wrong; PALLAS_KERNELS_DISABLE=NAME,NAME then goes on without it."""

    def run(self) -> None:
        """Prints the report."""
        print("\n".join(report()), flush=True)
        if self.check and not _all_are_right():
            raise SystemExit(1)


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
    from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL

    static = {"k": 4096, "group_size": 128, "transpose": False}
    return _reasons(LUT_MATMUL, (*_product(), None), static)


def _sparse_matmul() -> dict[str, str]:
    """The same for the layout of codes whose rows this platform skips."""
    import functools

    import jax
    import jax.numpy as jnp

    from pallas_kernels.sparse_matmul import KERNEL_LANES, BlockCodes, RowCodes, pack_rows
    from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL

    x, words, scales, lut = _product()
    lanes = KERNEL_LANES.get(jax.default_backend())
    weight: BlockCodes | RowCodes = BlockCodes(words, scales, lut, None, 4096, 128)
    if lanes is not None:
        codes = jax.ShapeDtypeStruct((4096, 4096), jnp.uint8)
        rows = jax.eval_shape(functools.partial(pack_rows, bits=4, lanes=lanes), codes)
        weight = RowCodes(rows, scales, lut, None, 128)
    return _reasons(SPARSE_MATMUL, (x, weight, jax.ShapeDtypeStruct((1,), jnp.float32)), {})


def _reasons(operation: Operation, arrays: tuple, static: dict) -> dict[str, str]:
    from pallas_kernels.platforms import DISABLED, disabled

    names, best = operation.implementations, operation.best_here(arrays, static)
    reasons = {name: operation.reason_against_here(name, arrays, static) for name in names}
    reasons |= dict.fromkeys(disabled().intersection(names), f"{DISABLED} names it")
    return {name: _said(reason, name == best) for name, reason in reasons.items()}


def _all_are_right() -> bool:
    """Prints what became of the checks of all kernels that take any of them here."""
    from lutjax.progress import progress_bar
    from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
    from pallas_kernels.self_check import SPARSE_CHECKS, checks_here
    from pallas_kernels.sparse_matmul.dispatch import SPARSE_MATMUL

    failed = 0
    print("\nproducts compared with float64:", flush=True)
    operations: tuple[tuple[Operation, tuple[Any, ...]], ...] = (
        (LUT_MATMUL, checks_here()),
        (SPARSE_MATMUL, SPARSE_CHECKS),
    )
    for operation, checks in operations:
        for name in filter(_is_for_here, operation.implementations):
            bar = progress_bar(checks, name, "check", show=sys.stderr.isatty())
            outcomes = {check: check.run(name) for check in bar}
            counts = collections.Counter(outcome.status for outcome in outcomes.values())
            taken = len(outcomes) - counts["refused"]
            if not taken:
                continue
            refused = f" ({counts['refused']} refused)" if counts["refused"] else ""
            print(
                f"  {operation.name} {name}: {counts['ok']} of {taken} right{refused}", flush=True
            )
            failed += counts["FAILED"]
            for check, outcome in outcomes.items():
                if outcome.status == "FAILED":
                    print(f"    {check}: {outcome.describe(check.limit)}", flush=True)
    return not failed


def _is_for_here(name: str) -> bool:
    """Whether an implementation is one for this platform, and not disabled."""
    from pallas_kernels.platforms import KERNEL_PLATFORM, disabled, platform_here

    return KERNEL_PLATFORM.get(name, platform_here()) == platform_here() and name not in disabled()


def _said(reason: str | None, is_default: bool) -> str:
    if reason is not None:
        return f"no: {reason.split('; ')[0]}"
    return "runs here, the default" if is_default else "runs here"


def _product() -> tuple[Any, Any, Any, Any]:
    """The shapes of one product: x, words, scales, table."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return (
        jax.ShapeDtypeStruct((1, 4096), dtype),
        jax.ShapeDtypeStruct((512, 4, 4096), jnp.uint8),
        jax.ShapeDtypeStruct((32, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 16, 1), jnp.float32),
    )
