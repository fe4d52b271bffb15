"""Compiles the C++ CPU kernels into the wheel if jax and a compiler are at hand.

Everything else is in pyproject.toml. Without them (an isolated build has no jax) the wheel is pure
Python, and the kernels are compiled on first use or XLA computes their products. Where the
environment variable LUTJAX_REQUIRE_NATIVE is set, as for released wheels, that is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import sys

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = pathlib.Path("pallas_kernels/native")


def left_for_first_use(error: Exception) -> None:
    """Says why the wheel is pure Python, or fails if it must not be."""
    if os.environ.get("LUTJAX_REQUIRE_NATIVE"):
        raise SystemExit(f"LUTJAX_REQUIRE_NATIVE is set, but: {error}") from error
    print(f"The C++ CPU kernels are left for first use: {error}", file=sys.stderr)


@functools.cache
def native_library():
    """The module that builds the kernels, or None without jax."""
    spec = importlib.util.spec_from_file_location("native_library", FOLDER / "library.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.compiler()
    except (ImportError, RuntimeError) as error:
        left_for_first_use(error)
        return None
    return module


class BuildKernels(build_py):
    """Adds the shared library to the files of the package."""

    def run(self) -> None:
        """Copies the sources, then compiles."""
        super().run()
        native = native_library()
        if native is None or self.editable_mode:
            return
        try:
            native.build(pathlib.Path(self.build_lib) / FOLDER / native.installed_name())
        except native.BuildError as error:
            left_for_first_use(error)


class PlatformWheel(bdist_wheel):
    """The library belongs to a platform and to no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tags of the file name."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class MaybeBinary(Distribution):
    """A binary distribution where the kernels can be compiled."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel depends on the platform."""
        return native_library() is not None


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel}, distclass=MaybeBinary)
