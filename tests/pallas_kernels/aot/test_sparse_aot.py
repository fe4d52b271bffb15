"""The sparse kernels compile for absent hardware, and their code reads live rows only.

Nothing runs here: "compiles", never "runs" or "fast".
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import compilers
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from ptx import Program

from pallas_kernels.sparse_matmul import RowCodes, pack_rows, pallas_triton, sparse_matmul

S = jax.ShapeDtypeStruct
K = N = 4096
THRESHOLD = S((), jnp.float32)


def codes(bits, lanes):
    """A lookup-table weight with codes packed along N."""

    def make(codes, scales, lut):
        return RowCodes(pack_rows(codes, bits, lanes), scales, lut, None, 128)

    lut = S((1, 2**bits, 1), jnp.float32)
    return jax.eval_shape(make, S((K, N), jnp.uint8), S((K // 128, N), jnp.bfloat16), lut)


def ptx(m, weight):
    """The text of the Triton kernel."""
    jax.clear_caches()  # a broken kernel must not be what another test traced
    _, files = compilers.compile_for(
        "h200",
        functools.partial(sparse_matmul, implementation="pallas_triton"),
        S((m, K), jnp.bfloat16),
        weight,
        THRESHOLD,
    )
    texts = {f: Path(f).read_text() for f in files if f.endswith(".ptx")}
    ((path, text),) = ((f, t) for f, t in texts.items() if ".entry sparse_matmul(" in t)
    return path, text


def dead_rows_are_not_loaded(text):
    """Whether every load of the weight is behind a comparison of activations in float32."""
    program = Program(text, "sparse_matmul")
    x, weight = "sparse_matmul_param_0", "sparse_matmul_param_2"
    loads = program.loads_of(weight)
    assert loads and program.loads_of(x)

    def compares(predicate):
        tests = [i for i in program.origins([predicate]) if re.match(r"setp\.\w+\.f32", i.opcode)]
        return any(program.come_from(i.read(), x) for i in tests)

    return all(load.predicate is not None and compares(load.predicate) for load in loads)


@pytest.mark.parametrize("m,bits", [(1, 0), (4, 0), (1, 4), (1, 3), (2, 2)])
def test_gpu_loads_of_dead_rows_are_predicated_off(m, bits):
    compilers.need_gpu()
    path, text = ptx(m, codes(bits, 32) if bits else S((K, N), jnp.bfloat16))
    assert dead_rows_are_not_loaded(text)
    assert compilers.Sass(path).spills == 0


def test_a_gpu_kernel_that_loads_every_row_is_found_out(monkeypatch):
    compilers.need_gpu()
    original = pallas_triton._activations

    def every_row(*arguments, **options):
        rows, live, values = original(*arguments, **options)
        return rows, jnp.ones_like(live), values

    monkeypatch.setattr(pallas_triton, "_activations", every_row)
    assert not dead_rows_are_not_loaded(ptx(1, S((K, N), jnp.bfloat16))[1])


def tpu_copies(target, m, weight):
    """Whether the program moves the weight before the kernel; sizes of the kernel's own copies."""
    jax.clear_caches()
    compiled, files = compilers.compile_for(
        target,
        functools.partial(sparse_matmul, implementation="mosaic_tpu"),
        S((m, K), jnp.bfloat16),
        weight,
        THRESHOLD,
    )
    text = compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    rows = weight.words if isinstance(weight, RowCodes) else weight
    size = rows.size * rows.dtype.itemsize
    moved = [
        line
        for line in entry.splitlines()
        if re.search(r" (copy|slice|copy-start|slice-start|fusion)\(", line)
        and any(size // 8 <= n for n in byte_counts(line))
    ]
    kernel = {f for f in files if "sparse_matmul" in f}
    bundles = compilers.kernel_report(kernel, "-final_bundles.txt").splitlines()
    copies = [line for line in bundles if "= dma.hbm_to" in line and "shalt" not in line]
    granules = [int(re.search(r"size_in_granules=\*/(\d+)", c).group(1)) for c in copies]
    return bool(moved), [32 * n for n in granules]


def byte_counts(line):
    """Sizes of the arrays that a line of HLO names."""
    sizes = {"s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
    for kind, dims in re.findall(r"\b(s8|u8|bf16|s32|u32|f32)\[([\d,]+)\]", line):
        yield sizes[kind] * functools.reduce(lambda a, b: a * int(b), dims.split(","), 1)


@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("m,bits", [(1, 0), (4, 0), (1, 4), (2, 3)])
def test_tpu_copies_single_rows_and_nothing_else_of_the_weight(target, m, bits):
    compilers.need_tpu()
    weight = codes(bits, 128) if bits else S((K, N // 128, 128), jnp.bfloat16)
    moved, copies = tpu_copies(target, m, weight)
    rows = weight.words if bits else weight
    assert not moved
    # Eight rows before the loop, and eight in it for the next step.
    row = rows.size // K * rows.dtype.itemsize
    assert len([size for size in copies if size >= row]) == 16
    assert all(size < 2 * row for size in copies)


def test_a_weight_that_the_compiler_may_move_is_moved_as_a_whole(monkeypatch):
    compilers.need_tpu()
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda array, _: array)
    moved, _ = tpu_copies("v6e", 1, S((K, N // 128, 128), jnp.bfloat16))
    assert moved
