"""Operations with several implementations, of which each platform gets the best that it has."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.platforms import (
    KERNEL_PLATFORM,
    compiling_for,
    disabled,
    interpreting,
    platform_here,
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """A product with several implementations.

    Each of them is a module ``pallas_kernels.<operation>.<implementation>`` with two functions that
    take the same arguments, positional arrays and static keywords:

    - a product, of the name of the operation;
    - ``supports``, which looks at shapes and dtypes only and returns None if the product can run,
      else the reason why not.

    Attributes:
      name: Of the operation.
      implementations: The names of all of them.
      preference: For a platform the implementations that are faster than the fallback, best first.
      fallback: The implementation that computes everything on every platform.
      loses: Whether the fallback is faster than the named one for these arrays and static keywords.
      operands: The arrays in the form that the named implementation reads.
      interpretable: Whether kernels run inside ``interpret_kernels()``.
    """

    name: str
    implementations: tuple[str, ...]
    preference: Mapping[str, tuple[str, ...]]
    fallback: str
    loses: Callable[[str, tuple, dict], bool] = lambda *_: False
    operands: Callable[[str, tuple], tuple] = lambda _, arrays: arrays
    interpretable: bool = False

    def backend(self, name: str) -> Any:
        """The module of an implementation, imported on first use, or why it cannot be imported."""
        try:
            return importlib.import_module(f"pallas_kernels.{self.name}.{name}")
        except (ImportError, AttributeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    def reason_against(self, name: str, arrays: tuple, static: dict) -> str | None:
        """Why the named implementation cannot compute this product, or None if it can."""
        module = self.backend(name)
        return module if isinstance(module, str) else module.supports(*arrays, **static)

    def reason_against_here(self, name: str, arrays: tuple, static: dict) -> str | None:
        """Like :meth:`reason_against`, and the platform must be the right one or interpreted."""
        platform = KERNEL_PLATFORM.get(name)
        if platform is None or compiling_for(platform) or self.interprets(name):
            return self.reason_against(name, arrays, static)
        # Without importing what may take long or be absent.
        here = f"the default backend is {jax.default_backend()!r}"
        if platform == "cpu":
            return f"it is for CPUs and {here}"
        ahead = "trace under an abstract device to compile ahead of time"
        ways = f"{ahead}, or interpret_kernels() for its numbers"
        return (
            f"it is a kernel for {platform} and {here}; use implementation=None, "
            f"{ways if self.interpretable else f'or {ahead}'}"
        )

    def interprets(self, name: str | None) -> bool:
        """Whether the named implementation runs in interpret mode here."""
        is_pallas = name in KERNEL_PLATFORM and name != "cpu_native"
        return self.interpretable and is_pallas and interpreting()

    def check_name(self, name: str | None) -> None:
        """Raises ValueError if ``implementation=name`` is unknown."""
        if name is not None and name not in self.implementations:
            raise ValueError(
                f"implementation={name!r} is unknown; use None or one of {self.implementations}"
            )

    def check_runs_here(self, name: str | None, arrays: tuple, static: dict) -> None:
        """Raises NotImplementedError if ``implementation=name`` cannot compute the product here."""
        reason = None if name is None else self.reason_against_here(name, arrays, static)
        if reason is not None:
            raise NotImplementedError(f"implementation {name!r} cannot run this product: {reason}")

    def best_here(self, arrays: tuple, static: dict) -> str:
        """The implementation that None takes on the platform that programs are compiled for here.

        Kernels that ``PALLAS_KERNELS_DISABLE`` names are left out, and if a dimension is symbolic
        (:func:`jax.export.symbolic_shape`) all of them, as they are made for one size.
        """
        if not all(isinstance(size, int) for a in jax.tree.leaves(arrays) for size in a.shape):
            return self.fallback
        names = (*self.preference.get(platform_here(), ()), self.fallback)
        without = disabled()
        left = (name for name in names if name not in without)
        best = next(name for name in left if self.reason_against(name, arrays, static) is None)
        return self.fallback if self.loses(best, arrays, static) else best

    def run(self, name: str | None, arrays: tuple, static: dict) -> Any:
        """The product by the named implementation, or by the best one of each platform.

        Tracing a kernel takes seconds, so only the platform that programs are compiled for here
        gets its kernels. A program lowered for another one without an abstract device computes the
        product by the fallback there.
        """

        def by(name: str) -> Callable[..., Any]:
            product = getattr(self.backend(name), self.name)
            return lambda *arrays: product(*self.operands(name, arrays), **static)

        if name is not None:
            return by(name)(*arrays)
        best, fallback = self.best_here(arrays, static), by(self.fallback)
        if best == self.fallback:
            return fallback(*arrays)
        return jax.lax.platform_dependent(*arrays, default=fallback, **{platform_here(): by(best)})
