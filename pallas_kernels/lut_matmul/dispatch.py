"""Which implementation computes a product, for each platform it may be lowered for."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import math
import os
from collections.abc import Iterator
from typing import Any, Protocol

import jax

IMPLEMENTATIONS = (
    "reference",
    "xla",
    "cpu_native",
    "pallas_triton",
    "mosaic_gpu",
    "mosaic_tpu",
    "triton",
)

# Best first for canonical words; the last of each list supports everything. The Hopper kernel is
# the best for prepacked words only: reordering them costs more than Triton's slower lookups.
_PREFERENCE = {
    "cpu": ("cpu_native", "xla", "reference"),
    "cuda": ("triton", "pallas_triton", "mosaic_gpu", "xla", "reference"),
    "tpu": ("mosaic_tpu", "xla", "reference"),
}
_OTHER_PLATFORMS = ("xla", "reference")

# Rows of x from which a GPU dequantises tiles of canonical words and multiplies them as dense
# matrices, by the kernel that is left for it. Wall times at 4096 x 28672, 4 bits, M = 16 and 512 on
# an H100: XLA 0.49 and 0.75 ms, triton 0.09 and 0.68, and its time grows with the rows; on an H200
# pallas_triton 0.36 and 4.1. Other shapes, the transposed product and other GPUs were not timed.
_DENSE_ROWS = {"triton": 512, "pallas_triton": 32}

# From here on the transposed native kernel, which backward passes use, loses to a dense product of
# dequantised tiles: 11.1 against 5.5 ms of processor time at M = 512, 2.7 against 2.0 at 128.
_DENSE_ROWS_CPU_TRANSPOSED = 128

# Kernels of one platform; elsewhere they run in interpret mode only.
KERNEL_PLATFORM = {
    "mosaic_tpu": "tpu",
    "mosaic_gpu": "cuda",
    "pallas_triton": "cuda",
    "triton": "cuda",
}

DISABLED = "PALLAS_KERNELS_DISABLE"
"""The environment variable with names of kernels, and commas between them, that None never takes.

For a kernel that fails or is slow on some device. Read while a program is traced.
"""

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Runs named Pallas kernels in interpret mode: right numbers on any platform, slowly.

    >>> with interpret_kernels():
    ...     interpreting()
    True
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether named kernels run in interpret mode here."""
    return _interpreted.get()


class Backend(Protocol):
    """What a backend module offers; both functions take the arguments of ``lut_matmul``."""

    def supports(
        self, x: Any, words: Any, scales: Any, lut: Any, offsets: Any, **static
    ) -> str | None:
        """None if the product can run, else the reason why not. Looks at shapes and dtypes only."""

    def lut_matmul(self, x: Any, words: Any, scales: Any, lut: Any, offsets: Any, **static) -> Any:
        """The product for ``x`` of shape [M, K], or [M, N] when transposed."""


def backend(name: str) -> Backend | str:
    """The backend module, imported on first use, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"pallas_kernels.lut_matmul.{name}")
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def disabled() -> frozenset[str]:
    """The kernels that :data:`DISABLED` names.

    Raises:
      ValueError: If it names something else; what every product can fall back to is no kernel.

    >>> "xla" in disabled()
    False
    """
    names = frozenset(filter(None, os.environ.get(DISABLED, "").replace(" ", "").split(",")))
    kernels = ("cpu_native", *sorted(KERNEL_PLATFORM))
    unknown = sorted(names.difference(kernels))
    if unknown:
        raise ValueError(f"{DISABLED} names {', '.join(unknown)}; it takes {', '.join(kernels)}")
    return names


def reason_against(name: str, arrays: tuple, static: dict) -> str | None:
    """Why the named implementation cannot compute this product, or None if it can."""
    module = backend(name)
    return module if isinstance(module, str) else module.supports(*arrays, **static)


def compiling_for(platform: str) -> bool:
    """Whether programs traced here are for ``platform`` as far as one can know."""
    name = {"cuda": "gpu"}.get(platform, platform)
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return name == (abstract.platform if abstract is not None else jax.default_backend())


def reason_against_here(name: str, arrays: tuple, static: dict) -> str | None:
    """Like :func:`reason_against`, and the platform must be the right one or interpreted."""
    if name == "cpu_native" and not compiling_for("cpu"):
        return f"it is for CPUs and the default backend is {jax.default_backend()!r}"
    platform = KERNEL_PLATFORM.get(name)
    if platform is None or interpreting() or compiling_for(platform):
        return reason_against(name, arrays, static)
    return (  # without importing what may take long or be absent
        f"it is a kernel for {platform} and the default backend is {jax.default_backend()!r}; "
        "use implementation=None, trace under an abstract device to compile ahead of time, or "
        "interpret_kernels() for its numbers"
    )


def best_per_platform(arrays: tuple, static: dict) -> tuple[dict[str, str], str]:
    """The preferred implementation of every known platform, and the one for all others.

    Tracing a kernel takes seconds, so only the platform that programs are compiled for here gets
    its kernels; a program lowered for another one without an abstract device falls back to XLA.
    """
    without = disabled()

    def best(names: tuple[str, ...]) -> str:
        check = reason_against_here
        left = (name for name in names if name not in without)
        return next(name for name in left if check(name, arrays, static) is None)

    preference = dict(_PREFERENCE)
    if not compiling_for("cpu"):  # do not build the native library for a fall back nobody runs
        preference["cpu"] = _OTHER_PLATFORMS
    if arrays[0].shape[0] >= _DENSE_ROWS.get(best(preference["cuda"]), math.inf):
        preference["cuda"] = _OTHER_PLATFORMS
    if static["transpose"] and arrays[0].shape[0] >= _DENSE_ROWS_CPU_TRANSPOSED:
        preference["cpu"] = _OTHER_PLATFORMS
    other = best(_OTHER_PLATFORMS)
    return {platform: best(names) for platform, names in preference.items()}, other


def device_kind(platform: str) -> str | None:
    """The kind of device that is compiled for, if it is of ``platform`` and known at trace time.

    An abstract mesh with an abstract device (compilation for absent hardware) wins over the
    default backend.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if not compiling_for(platform):
        return None
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind
