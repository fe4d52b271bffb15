"""The device that programs are for, as far as one can know while they are traced."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

import jax

KERNEL_PLATFORM = {
    "cpu_native": "cpu",
    "mosaic_gpu": "cuda",
    "mosaic_tpu": "tpu",
    "pallas_triton": "cuda",
    "triton": "cuda",
}
"""The platform of each kernel; elsewhere those of Pallas run in interpret mode only."""

DISABLED = "PALLAS_KERNELS_DISABLE"
"""The environment variable with names of kernels, and commas between them, that None never takes.

For a kernel that fails or is slow on some device. It is read while a product is traced, and traces
are kept: set it before Python starts, or call :func:`jax.clear_caches` afterwards.
"""

_interpreted = contextvars.ContextVar("interpreted", default=False)


def platform_here() -> str:
    """The platform that programs traced here are for: ``"cpu"``, ``"cuda"``, ``"tpu"``, others.

    An abstract mesh with an abstract device (compilation for absent hardware) wins over the
    default backend.
    """
    abstract = _abstract_device()
    name = jax.default_backend() if abstract is None else abstract.platform
    return {"gpu": "cuda"}.get(name, name)


def compiling_for(platform: str) -> bool:
    """Whether programs traced here are for ``platform``."""
    return platform_here() == platform


def device_kind(platform: str) -> str | None:
    """The kind of device that is compiled for, if it is of ``platform``; else None."""
    if not compiling_for(platform):
        return None
    abstract = _abstract_device()
    return jax.devices()[0].device_kind if abstract is None else abstract.device_kind


def _abstract_device() -> jax.sharding.AbstractDevice | None:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def disabled() -> frozenset[str]:
    """The kernels that :data:`DISABLED` names.

    Raises:
      ValueError: If it names something else; what every product can fall back to is no kernel.

    >>> "xla" in disabled()
    False
    """
    names = frozenset(filter(None, os.environ.get(DISABLED, "").replace(" ", "").split(",")))
    unknown = sorted(names.difference(KERNEL_PLATFORM))
    if unknown:
        kernels = ", ".join(KERNEL_PLATFORM)
        raise ValueError(f"{DISABLED} names {', '.join(unknown)}; it takes {kernels}")
    return names


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
