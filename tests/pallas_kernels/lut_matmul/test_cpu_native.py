"""The native CPU kernels against the formula, as a JAX function, on bad input, and their build."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lut_cases import (
    CASES,
    QUANTIZED,
    TOLERANCE,
    Case,
    make,
    operands,
    oracle,
    oracle_weight,
    relative_error,
)

from pallas_kernels import native
from pallas_kernels.lut_matmul import cpu_native, lut_matmul
from pallas_kernels.native import library, loader

pytestmark = pytest.mark.skipif(
    native.availability() is not None, reason=str(native.availability())
)

INSTRUCTIONS = native.instruction_sets() if native.availability() is None else ()
# Wide and single tiles, tiles that stick out, every way in which rows of x are grouped.
EDGES = [
    *(Case(m=m, n=584, k=136, group_size=32, dtype="float32") for m in (1, 2, 3, 4, 5, 7, 13)),
    *(
        Case(m=m, bits=b, n=33, k=77, group_size=32, dtype="float32", tables="channel")
        for m in (1, 6)
        for b in (1, 2, 3, 5, 8)
    ),
    *(Case(m=m, bits=b, n=600, dtype="float32") for m in (1, 6) for b in (1, 5, 6, 7)),
    Case(m=2, bits=1, p=2, k=90, n=40, transpose=True, offsets=True, dtype="float32"),
    *(Case(m=1, bits=b, p=2, n=72, dtype="float32") for b in (5, 6, 7, 8)),
    Case(m=5, bits=6, p=2, k=77, n=40, offsets=True, dtype="float32"),
    Case(m=2, bits=7, p=2, k=90, n=40, transpose=True, offsets=True, dtype="float32"),
    *(Case(m=1, bits=b, n=600, dtype="float32", offsets=True) for b in (2, 3, 8)),
    Case(m=530, n=40, k=264, group_size=88, dtype="float32", scale_dtype="bfloat16"),
    Case(m=3, n=100, transpose=True, dtype="float32", scale_dtype="float16"),
]


def error(case: Case, instructions: str) -> float:
    """Relative to the formula; the product must be supported and keep the dtype."""
    data = make(case)
    assert cpu_native.supports(*operands(data), **case.static) is None
    y = cpu_native.lut_matmul(*operands(data), **case.static, instructions=instructions)
    assert y.dtype == data["x"].dtype
    return relative_error(y, oracle(case, data))


@pytest.mark.parametrize("case", [*CASES, *EDGES, *QUANTIZED], ids=str)
def test_equals_the_formula(case):
    assert error(case, "") < TOLERANCE[case.dtype]


@pytest.mark.parametrize("instructions", INSTRUCTIONS[1:])
@pytest.mark.parametrize(
    "case",
    [
        *EDGES[::4],
        *QUANTIZED[::2],
        *(Case(m=1, bits=b, n=70, dtype="float32") for b in (1, 5, 6, 7)),
        Case(bits=3, transpose=True),
        Case(m=1, dtype="float32"),
    ],
    ids=str,
)
def test_every_instruction_set_equals_the_formula(case, instructions):
    assert error(case, instructions) < TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case", [c for c in QUANTIZED if c.scale_dtype == "float16" and not c.form.floor], ids=str
)
def test_quantised_scales_are_exact(case):
    # An integer of 8 bits times a float16 is a number of float32.
    case = dataclasses.replace(case, offsets=False, transpose=False)
    data = make(case)
    eye = jnp.eye(case.k)
    y = cpu_native.lut_matmul(eye, *operands(data)[1:], **case.static)
    np.testing.assert_array_equal(y, oracle_weight(case, data).astype(np.float32))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_scale_is_taken_exactly(dtype, instructions):
    bits = np.arange(0, 1 << 16, 37, dtype=np.uint16)
    extremes = np.array([0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7E00, 0x8001, 0xFBFF], np.uint16)
    scales = np.concatenate([bits, extremes]).view(jnp.dtype(dtype))[None]
    words = jnp.zeros((1, 4, scales.size), jnp.uint8)
    x, lut = jnp.eye(1, 8), jnp.ones((1, 16, 1))
    y = cpu_native.lut_matmul(
        x, words, jnp.asarray(scales), lut, k=8, group_size=8, instructions=instructions
    )
    expected = scales.astype(np.float32)
    # XLA's threads take float32 numbers below this for zero.
    tiny = np.abs(expected) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(np.where(tiny, 0, y), np.where(tiny, 0, expected))


def float8(_):
    """The values of bytes as E4M3; the two that are NaN have those that their bits would have."""
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.where(np.isnan(values), np.copysign(480, values), values)


TABLES = {
    "integers": lambda n: np.arange(n) - n // 2,
    "int": lambda n: (np.arange(n) - n // 2) / (n // 2 - 1),
    "affine": lambda n: np.arange(n) / (n - 1),
    "without zero": lambda n: np.arange(n) + 1,
    "float8": float8,
    "float8 by a third": lambda n: float8(n) * np.float32(1 / 3),
}


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("bits", "name"),
    [(bits, name) for name in TABLES for bits in (6, 7, 8) if bits == 8 or "float8" not in name],
)
def test_tables_that_are_formulas_are_computed(bits, name, instructions):
    case = Case(m=1, bits=bits, n=300, dtype="float32", offsets=True)
    lut = jnp.asarray(TABLES[name](2**bits), jnp.float32).reshape(1, -1, 1)
    # Two parts of a step need products and sums that are rounded once.
    inexact = () if instructions == "portable" else ("int", "affine")
    known = ("integers", "float8", "float8 by a third", *inexact)
    assert native.computes(lut[0, :, 0], instructions) == (name in known)
    assert not native.computes(lut[0, :, 0].at[1].multiply(1 + 1e-6), instructions)
    if "float8" not in name:  # the second part of the step of such entries would overflow by itself
        assert not native.computes(jnp.float32(lut[0, :, 0] / np.float32(3.3e-20)), instructions)
    x, words, scales, _, offsets = operands(make(case))

    def product(x, lut, **static):
        static = case.static | static | {"instructions": instructions}
        return cpu_native.lut_matmul(x, words, scales, lut, offsets, **static)

    tables = jnp.tile(lut, (case.n, 1, 1))  # one a column is always looked up
    for rows in (x, jnp.tile(x, (6, 1))):
        assert relative_error(product(rows, lut), product(rows, tables)) < TOLERANCE["float32"]
    # Each entry is the one of the table to the last bit.
    for rows in (1, 6):
        eye = jnp.eye(case.k)[:rows]
        assert jnp.array_equal(product(eye, lut), product(eye, tables))
    eye = jnp.eye(case.n)[:1]
    assert jnp.array_equal(product(eye, lut, transpose=True), product(eye, tables, transpose=True))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", ["integers", "int", "affine", "float8"])
def test_computed_entries_meet_large_and_infinite_activations(name, instructions):
    case = Case(m=1, bits=8, k=64, n=300, dtype="float32")
    lut = jnp.asarray(TABLES[name](256), jnp.float32).reshape(1, -1, 1)
    if name != "integers":
        lut /= jnp.max(jnp.abs(lut))
    assert native.computes(lut[0, :, 0], instructions) or instructions == "portable"
    x, words, scales, _, _ = operands(make(case))
    tables = jnp.tile(lut, (case.n, 1, 1))
    static = case.static | {"instructions": instructions}
    for value in (jnp.inf, -jnp.inf, jnp.nan, 1e37):
        large = x.at[0, 5].set(value)
        computed, looked_up = (
            np.asarray(cpu_native.lut_matmul(large, words, scales, t, **static))
            for t in (lut, tables)
        )
        # Where an infinite activation meets the entry zero, there is no number.
        np.testing.assert_allclose(computed, looked_up, rtol=1e-5)


def test_a_column_does_not_depend_on_its_neighbours_or_on_threads():
    case = Case(m=1, k=512, n=4096, dtype="float32")  # large enough for several threads
    x, words, scales, lut, _ = operands(make(case))
    product = jax.jit(functools.partial(cpu_native.lut_matmul, **case.static))
    whole = product(x, words, scales, lut)
    assert jnp.array_equal(whole, product(x, words, scales, lut))
    for columns in (slice(0, 64), slice(64, 1000), slice(4032, 4096)):
        part = product(x, words[..., columns], scales[:, columns], lut)
        assert jnp.array_equal(part, whole[:, columns])


def test_as_a_function_of_jax():
    case = Case(m=3, k=200, n=24, group_size=64, dtype="float32", offsets=True)
    x, *weight = operands(make(case))
    native = functools.partial(lut_matmul, **case.static, implementation="cpu_native")
    reference = functools.partial(lut_matmul, **case.static, implementation="reference")

    def grad(f):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(f)(x, *weight)))))(x)

    # sin of sums of 200 products in float32
    np.testing.assert_allclose(grad(native), grad(reference), rtol=1e-3, atol=1e-3)

    stacked = [
        jnp.stack([w, jnp.flip(w, -1)]) if w.ndim == 3 and w.shape[0] != 1 else w for w in weight
    ]
    axes = (None, *(0 if s is not w else None for s, w in zip(stacked, weight, strict=True)))
    mapped = jax.vmap(native, in_axes=axes)(x, *stacked)
    assert jnp.array_equal(mapped[1], native(x, stacked[0][1], *weight[1:]))

    def layer(x, words):
        return x, native(x, words, *weight[1:])

    _, scanned = jax.jit(lambda x, words: jax.lax.scan(layer, x, words))(x, stacked[0])
    assert jnp.array_equal(scanned, mapped)


def test_under_shard_map():
    case = Case(m=2, n=64, dtype="float32")
    x, words, scales, lut, _ = operands(make(case))
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    native = functools.partial(lut_matmul, **case.static, implementation="cpu_native")
    spec = jax.sharding.PartitionSpec
    columns = spec(None, "tensor")
    sharded = jax.shard_map(
        native,
        mesh=mesh,
        in_specs=(spec(), spec(None, None, "tensor"), columns, spec()),
        out_specs=columns,
    )
    assert jnp.array_equal(jax.jit(sharded)(x, words, scales, lut), native(x, words, scales, lut))


@pytest.mark.parametrize(
    "case,reason",
    [
        (Case(k=100, group_size=20), "group_size=20"),
        (Case(k=100, group_size=24, p=2), "group_size=24 is not a multiple of 16"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_named(case, reason):
    data = make(case)
    assert reason in cpu_native.supports(*operands(data), **case.static)
    with pytest.raises(NotImplementedError, match=reason):
        lut_matmul(*operands(data), **case.static, implementation="cpu_native")


def test_wrong_buffers_are_errors_with_their_shapes():
    """The custom call itself, below the argument checks: wrong buffers must not be read."""
    rng = np.random.default_rng(0)
    plain = {
        "x": (2, 64),
        "words": (8, 4, 40),
        "lut": (1, 16),
        "scales": (2, 40),
        "scale words": (0, 0, 0),
        "scale floor": (0,),
        "offsets": (2, 40),
        "offset words": (0, 0, 0),
        "offset floor": (0,),
        "y": (2, 40),
    }
    quantized = plain | {"scales": (1, 40), "scale words": (1, 6, 40)}
    quantized |= {"offsets": (2, 10), "offset words": (1, 8, 40), "offset floor": (1, 1)}
    forms = {"scale_form": np.int64([8, 1, 0]), "offset_form": np.int64([1, 4, 128])}
    static = {"k": 64, "group_size": 32, "transpose": False, "instructions": "", **forms}
    dtypes = {name: jnp.uint8 if "words" in name else jnp.float32 for name in plain}

    def call(shapes, dtypes, static):
        arrays = [jnp.zeros(shapes[n], dtypes[n]) for n in plain if n != "y"]
        result = jax.ShapeDtypeStruct(shapes["y"], jnp.float32)
        return jax.ffi.ffi_call(native.LUT_MATMUL, result)(*arrays, **static)

    for right in (plain, quantized):
        assert call(right, dtypes, static).shape == (2, 40)
    for i in range(80):
        right = quantized if i % 2 else plain
        name = rng.choice([name for name in right if "floor" not in name and right[name][0]])
        shape = list(right[name])
        if rng.random() < 0.3:
            shape = shape[1:] if rng.random() < 0.5 else [1, *shape]
        else:
            axis = rng.integers(len(shape))
            shape[axis] = max(shape[axis] + int(rng.choice([-1, 1, 7, -shape[axis]])), 0)
        # Empty offsets mean none, and XLA drops a call whose result is empty.
        if tuple(shape) == right[name] or (name in ("offsets", "y") and 0 in shape):
            continue
        with pytest.raises(Exception, match=r"lut_matmul: .*words\[|rank|dimensions"):
            call(right | {name: tuple(shape)}, dtypes, static)
    for bad in ({"k": 65}, {"k": 56}, {"k": -1}, {"group_size": 0}, {"group_size": 20}):
        with pytest.raises(Exception, match="lut_matmul: "):
            call(right, dtypes, static | bad)
    with pytest.raises(Exception, match="instruction set"):
        call(right, dtypes, static | {"instructions": "mmx"})
    for name in ("scales", "offsets"):
        with pytest.raises(Exception, match=f"{name} do not fit .* or are not float32, bfloat16"):
            call(plain, dtypes | {name: jnp.int32}, static)
    for bad in (np.int64([0, 1, 0]), np.int64([8, 0, 0]), np.int64([2, 1]), np.int64([1, 1, 0])):
        with pytest.raises(Exception, match="scales do not fit"):
            call(quantized, dtypes, static | {"scale_form": bad})


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "installed_name", lambda: "absent")
    loader._load.cache_clear()
    yield tmp_path
    loader._load.cache_clear()


@pytest.mark.parametrize(
    "compiler,reason", [("no-such-compiler", "there is no compiler"), ("false", "refuses")]
)
def test_without_a_compiler_it_says_so_and_xla_computes(
    nothing_built, monkeypatch, compiler, reason
):
    monkeypatch.setenv("CXX", compiler)
    case = Case(dtype="float32")
    data = make(case)
    assert reason in native.availability()
    with pytest.raises(NotImplementedError, match=reason):
        lut_matmul(*operands(data), **case.static, implementation="cpu_native")
    y = lut_matmul(*operands(data), **case.static)
    assert relative_error(y, oracle(case, data)) < TOLERANCE["float32"]
    assert not list(nothing_built.rglob("*.so"))
    assert not list(nothing_built.rglob(".build-*"))


SANITIZED = """
import pathlib
import sys
import jax
from pallas_kernels.native import library
jax.config.update("jax_disable_most_optimizations", True)  # of the oracle's programs
library.find_or_build = lambda: pathlib.Path(sys.argv[1])
import test_cpu_native as tests
for case in tests.CASES:
    assert tests.error(case, "") < tests.TOLERANCE[case.dtype]
for instructions in tests.INSTRUCTIONS:
    for case in (*tests.EDGES, *tests.QUANTIZED):
        assert tests.error(case, instructions) < tests.TOLERANCE[case.dtype]
    tests.test_tables_that_are_formulas_are_computed(8, "int", instructions)
    tests.test_tables_that_are_formulas_are_computed(8, "float8", instructions)
tests.test_wrong_buffers_are_errors_with_their_shapes()
import test_sparse_cpu_native as sparse
for instructions in sparse.INSTRUCTIONS:
    for case in sparse.EDGES:
        assert sparse.error(case, instructions) < sparse.TOLERANCE[case.dtype]
    sparse.test_equally_spaced_tables_are_computed(6, 31, instructions)
sparse.test_wrong_buffers_are_errors_with_their_shapes()
print("clean")
"""


def test_sanitizers_find_nothing(tmp_path):
    runtimes = [
        subprocess.run(
            [*library.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("the compiler has no address sanitizer for programs that do not use it")
    path = tmp_path / "library.so"
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0")
    library.build(path, flags)
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(
            [str(here), str(here.parent / "sparse_matmul"), str(here.parents[2])]
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"


def test_is_refused_where_programs_are_for_a_gpu():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with (
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
        pytest.raises(NotImplementedError, match="it is for CPUs"),
    ):
        lut_matmul(
            jnp.ones((1, 8)),
            jnp.zeros((1, 4, 2), jnp.uint8),
            jnp.ones((1, 2)),
            jnp.zeros((1, 16, 1)),
            k=8,
            group_size=8,
            implementation="cpu_native",
        )
