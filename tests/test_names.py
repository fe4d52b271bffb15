"""Every name that a function looks up exists.

Linters are told not to look: they take the shapes in annotations for names.
"""

import builtins
import dis
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("lutjax", "pallas_kernels", "train", "benchmarks", "examples", "tests")
MODULE_NAMES = {"__name__", "__file__", "__doc__", "__path__", "__spec__", "__annotations__"}


def undefined(source: str, name: str) -> set[str]:
    """Names that code reads from the module and that nothing in the module defines."""
    defined, read = set(dir(builtins)) | MODULE_NAMES, set()

    def visit(code: types.CodeType, top: bool) -> None:
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_GLOBAL" or (top and instruction.opname == "STORE_NAME"):
                defined.add(instruction.argval)
            elif instruction.opname == "LOAD_GLOBAL" or (top and instruction.opname == "LOAD_NAME"):
                read.add(instruction.argval)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                visit(constant, top=False)

    visit(compile(source, name, "exec"), top=True)
    return read - defined


@pytest.mark.parametrize("room", ROOMS)
def test_names_are_defined(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    missing = {str(file): names for file in files if (names := undefined(file.read_text(), "file"))}
    assert missing == {}


def test_an_undefined_name_is_found():
    source = "import os\nx = 1\ndef f(y):\n    return os, x, y, len, product(y)\n"
    assert undefined(source, "source") == {"product"}
