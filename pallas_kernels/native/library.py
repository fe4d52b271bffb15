"""Where the compiled C++ kernels come from: the package, the user's cache, or the compiler.

Installing with a compiler at hand puts the library beside this file (see ``setup.py``). Otherwise
it is compiled on first use, in less than a minute, and kept in the user's cache under a name that
holds a hash of the sources and the version of jaxlib, whose headers it is compiled with.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import jax
import jaxlib

PACKAGE = pathlib.Path(__file__).parent
SOURCES = PACKAGE / "csrc"

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-w")
_KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("-DLUT_AVX512", "-mavx512f", "-mfma"),
        "avx2": ("-DLUT_AVX2", "-mavx2", "-mfma", "-mf16c"),
        "portable": (),
    },
    "aarch64": {"neon": ("-DLUT_NEON",), "portable": ()},
}
_TIMEOUT_SECONDS = 900


class BuildError(RuntimeError):
    """There is no library and none can be built; the message says why."""


def find_or_build() -> pathlib.Path:
    """The path of the shared library, which is compiled if it has to be.

    Raises:
      BuildError: If there is no library and none can be built.
    """
    installed = PACKAGE / installed_name()
    if installed.exists():
        return installed
    cached = _cache_folder() / f"cpu_kernels-{_source_hash()}-jaxlib-{jaxlib.__version__}.so"
    if not cached.exists():
        compiler()  # before anything is said
        logging.getLogger(__name__).info("Compiling the CPU kernels once into %s", cached)
        build(cached)
    return cached


def installed_name() -> str:
    """The file name under which an installation keeps the library of these sources."""
    return f"_cpu_native_{_source_hash()}.so"


def build(path: pathlib.Path, extra_flags: tuple[str, ...] = ()) -> None:
    """Compiles the library and puts it at ``path`` in one step, whole or not at all.

    Args:
      path: Of the shared library.
      extra_flags: For the compiler and the linker, such as ``("-fsanitize=address",)``.

    Raises:
      BuildError: If there is no compiler, the machine is not known, or the compiler fails.
    """
    cxx = compiler()
    kernels = _KERNELS.get(_machine())
    if kernels is None or sys.platform == "win32":
        raise BuildError(f"no build is known for {sys.platform} on {platform.machine()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as name:
            folder = pathlib.Path(name)
            jobs = {
                f"{kernel}.o": (*flags, str(SOURCES / "kernels.cc"))
                for kernel, flags in kernels.items()
            }
            include = f"-I{jax.ffi.include_dir()}"
            for name in ("work", "lut_matmul", "sparse_matmul"):
                jobs[f"{name}.o"] = (include, str(SOURCES / f"{name}.cc"))
            common = (*cxx, *_FLAGS, *extra_flags)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                commands = [
                    (*common, *arguments, "-c", "-o", str(folder / output))
                    for output, arguments in jobs.items()
                ]
                list(pool.map(_run, commands))
            library = folder / "library.so"
            objects = (str(folder / output) for output in jobs)
            _run((*common, "-shared", "-pthread", *objects, "-o", str(library)))
            os.replace(library, path)
    except OSError as error:
        raise BuildError(f"cannot write the library to {path.parent}: {error}") from error


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: ``$CXX``, or the first that is found.

    Raises:
      BuildError: If there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return tuple(command)
    wanted = chosen[0] if chosen else "c++, g++ or clang++"
    raise BuildError(f"the C++ kernels are not compiled and there is no compiler ({wanted})")


def _machine() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _run(command: tuple[str, ...]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler does not run: {error}") from error
    if done.returncode:
        message = done.stderr.strip() or f"exit code {done.returncode}"
        raise BuildError(f"the compiler refuses the C++ kernels: {message[:2000]}")


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256(repr((_FLAGS, _KERNELS, _machine())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> pathlib.Path:
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"no folder to keep the compiled C++ kernels in: {error}") from error
    return pathlib.Path(base) / "pallas_kernels"
