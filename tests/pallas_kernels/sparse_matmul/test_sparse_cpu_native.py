"""The native sparse product: every instruction set, what it skips, and wrong buffers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_cases import TOLERANCE, Case, make, oracle, relative_error

from pallas_kernels import native
from pallas_kernels.sparse_matmul import cpu_native, sparse_matmul

pytestmark = pytest.mark.skipif(
    native.availability() is not None, reason=str(native.availability())
)

INSTRUCTIONS = native.instruction_sets() if native.availability() is None else ()
# Wide and narrow runs of columns, edges of both, all numbers of rows, codes in one byte and in two.
EDGES = [
    *(Case(k=77, n=2100, m=m, dtype="float32", per_row=True) for m in (1, 2, 3, 4)),
    Case(k=40, n=75),
    *(
        Case(bits=b, canonical=True, k=150, n=2100 if m == 1 else 70, m=m, dtype="float32")
        for b in (1, 2, 3, 4, 6, 8)
        for m in (1, 3)
    ),
    Case(bits=3, canonical=True, n=700, m=4, offsets=True, per_row=True, dtype="float32"),
    Case(bits=4, canonical=True, k=77, n=96, group_size=20, dtype="float32"),
]


def error(case: Case, instructions: str) -> float:
    """Relative to the formula; the product must be supported."""
    operands, dense = make(case)
    assert cpu_native.supports(*operands) is None
    y = cpu_native.sparse_matmul(*operands, instructions=instructions)
    return relative_error(y, oracle(operands, dense))


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_instruction_set_equals_the_formula(instructions):
    for case in EDGES:
        assert error(case, instructions) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("bits", "unit"), [(8, 1), (8, 127), (6, 31)])
def test_equally_spaced_tables_are_computed(bits, unit, instructions):
    case = Case(bits=bits, canonical=True, n=70, m=3, dtype="float32")
    (x, weight, thresholds), _ = make(case)
    half = 2 ** (bits - 1)
    lut = jnp.asarray(np.arange(-half, half) / unit, jnp.float32).reshape(1, -1, 1)
    # Two parts of a step need products and sums that are rounded once.
    assert native.computes(lut[0, :, 0], instructions) == (unit == 1 or instructions != "portable")
    weight = dataclasses.replace(weight, lut=lut)
    expected = sparse_matmul(x, weight, thresholds, implementation="reference")
    y = cpu_native.sparse_matmul(x, weight, thresholds, instructions=instructions)
    assert relative_error(y, np.asarray(expected, np.float64)) < TOLERANCE["float32"]


def columns(weight, start, stop):
    cut = {name: getattr(weight, name)[..., start:stop] for name in ("words", "scales")}
    return dataclasses.replace(weight, **cut)


@pytest.mark.parametrize("bits", [0, 3])
def test_a_column_does_not_depend_on_its_neighbours_or_on_threads(bits):
    case = Case(k=512, n=4096, bits=bits, canonical=True, dtype="float32")
    (x, weight, thresholds), _ = make(case)
    whole = sparse_matmul(x, weight, thresholds, implementation="cpu_native")
    for start, stop in ((0, 64), (64, 1000), (4032, 4096)):
        part = columns(weight, start, stop) if bits else weight[:, start:stop]
        y = sparse_matmul(x, part, thresholds, implementation="cpu_native")
        assert jnp.array_equal(y, whole[:, start:stop])


def test_it_is_the_default_on_a_cpu():
    for case in (Case(dtype="float32"), Case(bits=4, canonical=True)):
        operands, _ = make(case)
        y = sparse_matmul(*operands)
        assert jnp.array_equal(y, sparse_matmul(*operands, implementation="cpu_native"))


def test_as_a_function_of_jax():
    case = Case(m=3, k=200, n=24, bits=4, canonical=True, group_size=64, dtype="float32")
    (x, weight, thresholds), _ = make(case)

    def product(name):
        return lambda x, weight: sparse_matmul(x, weight, thresholds, implementation=name)

    def grad(name):
        def loss(x, scales):
            own = type(weight)(weight.words, scales, weight.lut, None, case.k, case.group_size)
            return jnp.sum(jnp.sin(jax.checkpoint(product(name))(x, own)))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, weight.scales)

    for actual, expected in zip(grad("cpu_native"), grad("reference"), strict=True):
        # sin of sums of 200 products in float32
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)

    both = jax.tree.map(lambda a: jnp.stack([a, jnp.flip(a, -1)]), weight)
    mapped = jax.vmap(product("cpu_native"), in_axes=(None, 0))(x, both)
    flipped = jax.tree.map(lambda a: a[1], both)
    assert jnp.array_equal(mapped[1], product("cpu_native")(x, flipped))
    _, scanned = jax.jit(
        lambda x, both: jax.lax.scan(lambda x, w: (x, product("cpu_native")(x, w)), x, both)
    )(x, both)
    assert jnp.array_equal(scanned, mapped)


def test_codes_of_dead_rows_take_no_part():
    case = Case(bits=4, canonical=True, k=64, dtype="float32")
    (x, weight, thresholds), _ = make(case)
    infinite = weight.lut.at[0, 0, 0].set(jnp.inf)
    words = jnp.full_like(weight.words, 0x11).at[1].set(0)  # eight rows are infinite
    weight = type(weight)(words, weight.scales, infinite, None, weight.k, weight.group_size)
    assert not np.isfinite(np.asarray(sparse_matmul(x, weight, thresholds))).any()
    y = np.asarray(sparse_matmul(x.at[0, 8:16].set(0), weight, thresholds))
    assert np.isfinite(y).all() and y.any()


def test_wrong_buffers_are_errors_with_their_shapes():
    """The custom calls themselves, below the argument checks: wrong buffers must not be read."""
    rng = np.random.default_rng(0)
    packed = {
        "x": (2, 60),
        "thresholds": (60,),
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
    forms = {"scale_form": np.int64([8, 1, 0]), "offset_form": np.int64([1, 4, 128])}
    quantized = packed | {"scales": (1, 40), "scale words": (1, 6, 40)}
    quantized |= {"offsets": (2, 10), "offset words": (1, 8, 40), "offset floor": (1, 1)}
    dense = {"x": (2, 60), "thresholds": (60,), "weight": (60, 40), "y": (2, 40)}
    common = {"instructions": ""}
    of_codes = common | {"k": 60, "group_size": 32, **forms}
    calls = [
        (native.SPARSE_PACKED, packed, of_codes),
        (native.SPARSE_PACKED, quantized, of_codes),
        (native.SPARSE_DENSE, dense, common),
    ]

    def call(target, shapes, static, **dtypes):
        for name in shapes:
            dtypes.setdefault(name, jnp.uint8 if "words" in name else jnp.float32)
        arrays = [jnp.zeros(shapes[n], dtypes[n]) for n in shapes if n != "y"]
        result = jax.ShapeDtypeStruct(shapes["y"], jnp.float32)
        return jax.ffi.ffi_call(target, result)(*arrays, **static)

    for target, right, static in calls:
        assert call(target, right, static).shape == (2, 40)
        for _ in range(25):
            name = rng.choice([n for n in right if "floor" not in n and right[n][0]])
            shape = list(right[name])
            if rng.random() < 0.3:
                shape = shape[1:] if rng.random() < 0.5 else [1, *shape]
            else:
                axis = rng.integers(len(shape))
                shape[axis] = max(shape[axis] + int(rng.choice([-1, 1, 7, -shape[axis]])), 0)
            # Empty offsets mean none, and XLA drops a call whose result is empty.
            if tuple(shape) == right[name] or (name in ("offsets", "y") and 0 in shape):
                continue
            with pytest.raises(Exception, match=r"sparse_matmul: .*x\[|rank|dimensions"):
                call(target, right | {name: tuple(shape)}, static)
        with pytest.raises(Exception, match="instruction set"):
            call(target, right, static | {"instructions": "mmx"})
    for bad in ({"k": 65}, {"k": 56}, {"k": -1}, {"group_size": 0}, {"group_size": -8}):
        with pytest.raises(Exception, match="sparse_matmul: "):
            call(native.SPARSE_PACKED, packed, of_codes | bad)
    with pytest.raises(Exception, match="or are not float32, bfloat16"):
        call(native.SPARSE_PACKED, packed, of_codes, scales=jnp.int32)
    with pytest.raises(Exception, match="bfloat16"):
        call(native.SPARSE_DENSE, dense, common, weight=jnp.float16)
