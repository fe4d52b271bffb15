"""Prepacked weights give the bits of the unpacked product."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as pltpu
from lut_cases import CASES, TOLERANCE, Case, make, operands, oracle, relative_error

from pallas_kernels import platforms
from pallas_kernels.layout import unpack
from pallas_kernels.lut_matmul import (
    dequantize,
    interpret_kernels,
    mosaic_gpu_layout,
    packed_columns,
    packed_matmul,
    packed_matmul_grouped,
    prepack,
    take_columns,
    zero_of_line,
)
from pallas_kernels.lut_matmul.columns import columns_by_tiles


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_tpu_layout_serves_any_number_of_rows(m, kind):
    case = Case(m=m, k=200, n=72, group_size=96, bits=3, offsets=True)
    data = make(case)
    x, words, scales, lut, offsets = operands(data)
    packed = prepack(
        words,
        scales,
        lut,
        offsets,
        k=case.k,
        group_size=case.group_size,
        implementation="mosaic_tpu",
        device_kind=kind,
    )
    y = packed_matmul(x[None], packed, interpret=True)
    assert y.shape == (1, m, case.n)
    assert relative_error(y[0], oracle(case, data)) <= 1.1e-2
    back = packed_matmul(y[0], packed, transpose=True, interpret=True)
    assert relative_error(back, oracle(case, data | {"x": y[0]}, transpose=True)) <= 1.1e-2


@pytest.mark.parametrize(
    ("m", "kind", "case"),
    [
        (1, "TPU v6 lite", Case(k=200, n=72, group_size=96, bits=3, offsets=True)),
        (1, "TPU v5 lite", Case(k=512, n=300, group_size=32)),
        (70, "TPU v6 lite", Case(k=2304, n=130, group_size=4096, tables="channel")),  # 2 blocks
    ],
    ids=str,
)
def test_tiles_meet_the_weights_of_their_groups(m, kind, case):
    def pack(*weight):
        return prepack(
            *weight,
            k=case.k,
            group_size=case.group_size,
            implementation="mosaic_tpu",
            device_kind=kind,
        )

    weights = [operands(make(case, seed))[1:] for seed in range(3)]
    groups, sizes = jnp.array([0, 2, 2, 1, 2]), jnp.array([m, m, 1, 0, 0])
    counts = jnp.arange(m)[None] < sizes[:, None]
    x = jax.random.normal(jax.random.key(0), (5, m, case.k), jnp.bfloat16)
    x = jnp.where(counts[..., None], x, jnp.zeros((), x.dtype))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    packed = jax.jit(jax.vmap(pack))(*stacked)
    strict = pltpu.InterpretParams()  # memory is NaN at first
    y = packed_matmul_grouped(x, packed, groups, sizes, interpret=strict)
    assert (y.shape, y.dtype) == ((5, m, case.n), x.dtype)
    packed = [pack(*weight) for weight in weights]
    for tile, group in enumerate(groups.tolist()):
        expected = packed_matmul(x[tile], packed[group], interpret=True)
        np.testing.assert_array_equal(y[tile], expected)


@pytest.mark.parametrize(
    ("m", "case"),
    [
        (1, Case(k=200, n=72, group_size=64, bits=3, offsets=True)),
        (9, Case(k=512, n=300, group_size=32)),
        (70, Case(k=384, n=130, group_size=4096, p=2)),  # a block of rows is empty
    ],
    ids=str,
)
def test_tiles_meet_the_weights_of_their_groups_on_hopper(m, case):
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no interpret mode for Mosaic GPU")

    def pack(*weight):
        with interpret_kernels():
            return prepack(
                *weight, k=case.k, group_size=case.group_size, implementation="mosaic_gpu"
            )

    data = [make(case, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[operands(d)[1:] for d in data])
    groups, sizes = jnp.array([0, 2, 2, 1]), jnp.array([m, m, 1, 0])
    counts = jnp.arange(m)[None] < sizes[:, None]
    x = jax.random.normal(jax.random.key(0), (4, m, case.k), jnp.bfloat16)
    x = jnp.where(counts[..., None], x, jnp.zeros((), x.dtype))
    y = packed_matmul_grouped(x, jax.vmap(pack)(*stacked), groups, sizes, interpret=True)
    assert (y.shape, y.dtype) == ((4, m, case.n), x.dtype)
    for tile, (group, size) in enumerate(zip(groups.tolist(), sizes.tolist(), strict=True)):
        expected = oracle(case, data[group] | {"x": x[tile]})
        if size:
            assert relative_error(y[tile, :size], expected[:size]) <= 1.1e-2
        assert not jnp.any(y[tile, size:])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_rows_are_no_product(shape):
    _, *weight = operands(make(Case(m=1, k=64, n=24)))
    with interpret_kernels():
        packed = prepack(
            *weight,
            k=64,
            group_size=64,
            implementation="mosaic_tpu",
            device_kind="TPU v6 lite",
        )
        y = packed_matmul(jnp.zeros(shape, jnp.bfloat16), packed)
    assert (y.shape, y.dtype) == ((*shape[:-1], 24), jnp.bfloat16)


def test_tiles_meet_the_weights_of_one_layout_only():
    case = Case(m=1, k=64, n=64)
    _, *weight = operands(make(case))
    weight = [None if a is None else a[None] for a in weight]
    packed = jax.vmap(lambda *w: prepack(*w, k=64, group_size=64, implementation="xla"))(*weight)
    x, groups, sizes = jnp.zeros((1, 1, 64)), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="'xla' has no product with several weights"):
        packed_matmul_grouped(x, packed, groups, sizes)


def test_a_layout_for_another_dtype_is_refused():
    case = Case(m=1, k=64, n=64)
    _, *arrays = operands(make(case))
    with interpret_kernels():
        packed = prepack(
            *arrays,
            k=64,
            group_size=64,
            implementation="mosaic_tpu",
            device_kind="TPU v6 lite",
        )
        with pytest.raises(TypeError, match="prepacked for activations of bfloat16, got float16"):
            packed_matmul(jnp.zeros((1, 64), jnp.float16), packed)


def test_without_a_layout_of_its_own_the_words_stay_canonical():
    case = Case()
    data = make(case)
    x, words, scales, lut, _ = operands(data)
    packed = prepack(words, scales, lut, k=256, group_size=64, implementation="reference")
    np.testing.assert_array_equal(packed.planes[0], words)
    leaves = jax.tree.leaves(packed)
    assert len(leaves) == 4  # no offsets
    with pytest.raises(ValueError, match=r"x of shape \(4, 255\) must end in K=256"):
        packed_matmul(x[:, :-1], packed)
    with pytest.raises(ValueError, match=r"x of shape \(4, 256\) must end in N=128 .*transposed"):
        packed_matmul(x, packed, transpose=True)
    back = packed_matmul(x[:, :128], packed, transpose=True)
    assert relative_error(back, oracle(case, data | {"x": x[:, :128]}, transpose=True)) <= 1.1e-2


@pytest.mark.parametrize("group_size,bits,p", [(64, 4, 1), (32, 4, 1), (64, 6, 2)])
def test_hopper_words_serve_both_directions(group_size, bits, p):
    case = Case(m=3, k=200, n=72, bits=bits, group_size=group_size, p=p, offsets=True)
    data = make(case)
    _, *weight = operands(data)
    with interpret_kernels():
        if not hasattr(mosaic_gpu, "InterpretGPUParams"):
            pytest.skip(f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
        packed = prepack(*weight, k=case.k, group_size=case.group_size, implementation="mosaic_gpu")
    y = packed_matmul(data["x"], packed, interpret=True)
    assert relative_error(y, oracle(case, data)) <= 1.1e-2
    if group_size == 32:
        with pytest.raises(NotImplementedError, match=r"group_size=32.*canonical words"):
            packed_matmul(y, packed, transpose=True, interpret=True)
        return
    back = packed_matmul(y, packed, transpose=True, interpret=True)
    expected = oracle(case, data | {"x": y}, transpose=True)
    assert relative_error(back, expected) <= 1.1e-2


def test_a_weight_that_the_kernel_does_not_take_is_refused():
    case = Case(bits=8, tables="channel")
    _, words, scales, lut, _ = operands(make(case))
    with pytest.raises(NotImplementedError, match=r"mosaic_tpu.*a table for each of 128 columns"):
        prepack(words, scales, lut, k=256, group_size=64, implementation="mosaic_tpu")


LAYOUTS = [
    ("mosaic_tpu", "TPU v5 lite"),
    ("mosaic_tpu", "TPU v6 lite"),
    ("mosaic_gpu", None),
    ("reference", None),
]


@pytest.mark.parametrize("case", [c for c in CASES if not c.transpose and c.m > 0], ids=str)
@pytest.mark.parametrize(("implementation", "kind"), LAYOUTS)
def test_columns_are_those_of_the_weight_to_the_last_bit(implementation, kind, case):
    _, *weight = operands(make(case))
    static = {"k": case.k, "group_size": case.group_size}
    layout = {"implementation": implementation, "device_kind": kind, "dtype": case.dtype}
    try:
        with interpret_kernels():
            packed = prepack(*weight, **static, **layout)
    except NotImplementedError as error:
        pytest.skip(str(error))
    columns = jnp.array([case.n - 1, 0, case.n // 2, 5, 5])
    dense = jax.jit(functools.partial(dequantize, **static, dtype=case.dtype))(*weight)
    np.testing.assert_array_equal(packed_columns(packed, columns), dense[:, columns])
    last = packed_columns(packed, jnp.array([-3, case.n, case.n + 200]))
    np.testing.assert_array_equal(last, dense[:, jnp.array([0, case.n - 1, case.n - 1])])


@pytest.mark.parametrize(("bits", "p"), [(2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (3, 2), (4, 2)])
def test_codes_of_hopper_columns_come_back(bits, p):
    words = jnp.asarray(np.random.default_rng(0).integers(0, 256, (12, bits * p, 130), np.uint8))
    planes = mosaic_gpu_layout.pack_fragments(words, 256, 192, p)
    codes = mosaic_gpu_layout.unpack_columns(planes, bits, jnp.arange(130), p)
    assert codes.shape == (256 // p, 130)
    np.testing.assert_array_equal(codes[:96], unpack(words)[: 256 // p])


@pytest.mark.parametrize("shape", [(5, 300), (3, 2, 128), (4, 40)])
@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8"])
def test_single_lanes_of_tiles_are_columns(shape, dtype):
    array = jax.random.randint(jax.random.key(0), shape, 0, 255, jnp.uint8)
    last = min(shape[-1] - 1, jnp.iinfo(dtype).max)
    columns = jnp.array([0, last, last // 2, 7, 7], dtype)
    expected = np.asarray(array)[..., np.asarray(columns)]
    np.testing.assert_array_equal(columns_by_tiles(array, columns.astype(jnp.int32)), expected)
    np.testing.assert_array_equal(take_columns(array, columns), expected)


def test_columns_out_of_range_are_clipped_in_either_way():
    array = jax.random.normal(jax.random.key(0), (3, 300))
    columns = jnp.array([-1, -500, 300, 1000])
    expected = array[:, jnp.array([0, 0, 299, 299])]
    np.testing.assert_array_equal(columns_by_tiles(array, columns), expected)
    np.testing.assert_array_equal(take_columns(array, columns), expected)


@pytest.fixture
def for_a_tpu(monkeypatch):
    """Programs as they are for a TPU, as far as that is XLA's own operations."""
    monkeypatch.setattr(platforms, "compiling_for", lambda platform: platform == "tpu")


@pytest.mark.parametrize(("count", "by_tiles"), [(2, True), (3, False)])
def test_columns_of_more_than_all_tiles_are_gathered_on_a_tpu(for_a_tpu, count, by_tiles):
    program = str(jax.make_jaxpr(take_columns)(jnp.zeros((4, 300)), jnp.zeros(count, jnp.int32)))
    assert ("scan" in program) == by_tiles
    assert ("gather" in program) != by_tiles


def line(bits, zero):
    """Equally spaced entries, rounded to float32."""
    entries = (np.arange(2**bits) - zero) / (2 ** (bits - 1) - 1)
    return jnp.asarray(entries, jnp.float32).reshape(1, -1, 1)


@pytest.mark.parametrize(("bits", "zero"), [(8, 128), (8, 0), (8, 77), (4, 8), (3, 0), (2, 2)])
def test_tables_on_a_line_are_known(bits, zero):
    lut = line(bits, zero)
    assert zero_of_line(lut) == zero == zero_of_line(jnp.stack([lut, lut]))
    last = lut.shape[1] - 1
    for other in (lut.at[0, 1, 0].multiply(1 + 1e-5), lut + 0.01, jnp.stack([lut, 2 * lut])):
        assert zero_of_line(other) is None
    assert zero_of_line(jnp.tile(lut, (2, 1, 1))) is None
    assert zero_of_line(lut.at[0, last, 0].set(0)) is None
    assert zero_of_line(np.asarray(lut)) == zero
    assert zero_of_line(jax.ShapeDtypeStruct(lut.shape, lut.dtype)) is None
    assert zero_of_line(lut.at[0, last, 0].set(jnp.inf)) is None
    traced = []
    jax.eval_shape(lambda lut: traced.append(zero_of_line(lut)), lut)
    assert traced == [None]


@pytest.mark.parametrize(
    ("bits", "zero"), [(8, 128), (8, 0), (8, 77), (4, 8), (4, 0), (3, 4), (2, 2)]
)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("TPU v6 lite", "bfloat16"),
        ("TPU v5 lite", "bfloat16"),
        ("TPU v6 lite", "float32"),
        ("TPU v5 lite", "float16"),
    ],
)
def test_codes_on_a_line_are_converted(kind, dtype, bits, zero):
    case = Case(bits=bits, dtype=dtype, offsets=zero != 77)
    data = make(case) | {"lut": line(bits, zero)}
    x, *weight = operands(data)
    static = {"k": case.k, "group_size": case.group_size}
    layout = {"implementation": "mosaic_tpu", "device_kind": kind, "dtype": dtype}
    w = prepack(*weight, **static, **layout, zero=zero)
    converts = bits >= 4 or (kind, dtype) == ("TPU v6 lite", "bfloat16")
    assert (w.layout.lookup in ("int8", "int32")) == converts
    y = packed_matmul(x, w, interpret=True)
    assert relative_error(y, oracle(case, data)) < TOLERANCE[dtype]
    back = packed_matmul(x[:, : case.n], w, transpose=True, interpret=True)
    expected = oracle(case, data | {"x": x[:, : case.n]}, transpose=True)
    assert relative_error(back, expected) < TOLERANCE[dtype]
    dense = np.asarray(dequantize(*weight, **static), np.float64)
    columns = packed_columns(w, jnp.arange(case.n))
    assert relative_error(columns, dense) < TOLERANCE[dtype] / 4  # one rounding


@pytest.mark.parametrize(("size", "scale"), [(2e38, 1e-37), (1.0, 1e-35), (1e-30, 1e30)])
def test_steps_and_scales_of_any_size_are_converted(size, scale):
    case = Case(bits=8, dtype="float32", k=64, n=40)
    data = make(case) | {"lut": line(8, 128) * size}
    data["scales"] = data["scales"] * scale
    x, *weight = operands(data)
    static = {"k": case.k, "group_size": case.group_size}
    layout = {"implementation": "mosaic_tpu", "device_kind": "TPU v6 lite", "dtype": case.dtype}
    w = prepack(*weight, **static, **layout, zero=zero_of_line(data["lut"]))
    assert w.layout.lookup == "int32" and w.scales.dtype == data["scales"].dtype
    y = packed_matmul(x, w, interpret=True)
    assert relative_error(y, oracle(case, data)) < 1e-5


def test_converted_scales_keep_their_dtype():
    data = make(Case(bits=4, scale_dtype="bfloat16", offsets=True))
    _, words, scales, _, offsets = operands(data)
    static = {"k": 256, "group_size": 64, "implementation": "mosaic_tpu"}
    layout = {"device_kind": "TPU v6 lite", "zero": 8}
    w = prepack(words, scales, line(4, 8), offsets, **static, **layout)
    assert w.layout.lookup == "int8"
    assert w.scales.dtype == w.offsets.dtype == jnp.bfloat16
