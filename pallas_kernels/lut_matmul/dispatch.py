"""Which implementation computes a product, for each platform it may be lowered for."""

from __future__ import annotations

import importlib
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

# Best first. The last of each list supports everything.
_PREFERENCE = {
    "cpu": ("cpu_native", "xla", "reference"),
    "cuda": ("mosaic_gpu", "triton", "pallas_triton", "xla", "reference"),
    "tpu": ("mosaic_tpu", "xla", "reference"),
}
_OTHER_PLATFORMS = ("xla", "reference")


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


def reason_against(name: str, arrays: tuple, static: dict) -> str | None:
    """Why the named implementation cannot compute this product, or None if it can."""
    module = backend(name)
    return module if isinstance(module, str) else module.supports(*arrays, **static)


def best_per_platform(arrays: tuple, static: dict) -> tuple[dict[str, str], str]:
    """The preferred implementation of every known platform, and the one for all others."""

    def best(names: tuple[str, ...]) -> str:
        return next(name for name in names if reason_against(name, arrays, static) is None)

    return {platform: best(names) for platform, names in _PREFERENCE.items()}, best(
        _OTHER_PLATFORMS
    )


def device_kind(platform: str) -> str | None:
    """The kind of device that is compiled for, if it is of ``platform`` and known at trace time.

    An abstract mesh with an abstract device (compilation for absent hardware) wins over the
    default backend.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        wanted = {"cuda": "gpu"}.get(platform, platform)
        return abstract.device_kind if abstract.platform in (platform, wanted) else None
    if jax.default_backend() == {"cuda": "gpu"}.get(platform, platform):
        return jax.devices()[0].device_kind
    return None
