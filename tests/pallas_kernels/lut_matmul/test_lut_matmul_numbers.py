"""Every implementation against the float64 oracle over the one list of cases (interpreted here)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import lut_cases
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from lut_cases import CASES, TOLERANCE, Case, make, operands, oracle, relative_error

from pallas_kernels.lut_matmul import (
    interpret_kernels,
    lut_matmul,
    mosaic_gpu,
    mosaic_tpu,
    reference,
)
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL


def small_tpu(case: Case, lookup: str | None = None):
    """The TPU kernel with small tiles (an interpreted tile costs the time to compile it).

    The TPU interpreter fills memory with NaN first, and refuses reads beyond it.
    """
    x, words, scales, lut, offsets = operands(make(case))
    group = 0 if case.group_size >= case.k else case.group_size // case.p
    config = mosaic_tpu.default_config(
        case.m,
        case.bits,
        codes=-(-case.k // case.p),
        group=group,
        n=128,
        dtype=x.dtype,
        per_channel=case.tables == "channel",
        transpose=case.transpose,
        device_kind=None,
    )
    step = mosaic_tpu.unit(case.bits)
    block_k = mosaic_tpu._block_k(case.bits, group, -(-case.k // case.p), max(step, 128))
    config = dataclasses.replace(
        config, block_k=block_k or config.block_k, lookup=lookup or config.lookup
    )
    return mosaic_tpu.lut_matmul(
        x,
        words,
        scales,
        lut,
        offsets,
        **case.static,
        config=config,
        interpret=pltpu.InterpretParams(),
    )


IMPLEMENTATIONS = {
    "reference": lambda case: lut_matmul(
        *operands(make(case)), **case.static, implementation="reference"
    ),
    "xla": lambda case: lut_matmul(*operands(make(case)), **case.static, implementation="xla"),
    "mosaic_tpu": small_tpu,
    "pallas_triton": lambda case: lut_matmul(
        *operands(make(case)), **case.static, implementation="pallas_triton"
    ),
}
# Threads that talk through callbacks make this interpreter slow: one case for each feature.
HOPPER_CASES = [
    Case(bits=2, k=256, n=128, group_size=128),
    Case(bits=3, dtype="float16"),
    Case(k=576, group_size=128, n=192),
    Case(bits=8, k=77, group_size=77, n=33, m=1, offsets=True),
    Case(k=768, group_size=384),
    # many rows: scales multiply the weight, in its dtype or in float32
    Case(m=130, group_size=32, scale_dtype="bfloat16"),
    Case(m=70, k=300, n=200, bits=3, group_size=128, dtype="float16"),
    Case(m=66, k=130, n=40, bits=8, group_size=16, offsets=True),
    Case(transpose=True, m=3, k=300, n=200, group_size=64),
    Case(transpose=True, m=130, bits=3, k=256, group_size=1024, scale_dtype="bfloat16"),
    Case(transpose=True, bits=2, k=200, n=72, group_size=128, dtype="float16"),
    Case(transpose=True, bits=8, k=384, group_size=384, offsets=True),
    # a code for two rows
    Case(p=2, bits=8, k=201, n=72, group_size=32, offsets=True),
    Case(p=2, bits=6, m=1, k=256, n=128, group_size=128, dtype="float16"),
    Case(p=2, bits=6, m=70, k=130, n=40, group_size=16),
    Case(p=2, bits=4, m=3, transpose=True),
]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """The interpreter unrolls a kernel into a large XLA program that runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_matches_the_oracle(name, case):
    data = make(case)
    with interpret_kernels():
        if LUT_MATMUL.reason_against(name, operands(data), case.static) is not None:
            with pytest.raises(NotImplementedError, match="cannot run"):
                lut_matmul(*operands(data), **case.static, implementation=name)
            return
        y = IMPLEMENTATIONS[name](case)
    assert y.dtype == case.dtype
    assert relative_error(y, oracle(case, data)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_kernel_matches_the_oracle(case):
    interpretable("mosaic_gpu", case)
    data = make(case)
    with interpret_kernels():
        y = lut_matmul(*operands(data), **case.static, implementation="mosaic_gpu")
    assert relative_error(y, oracle(case, data)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    "case,config",
    [  # columns that are no multiple of a step's, and steps of several tiles and slices
        (Case(m=5, n=200), mosaic_gpu.Config(1, 2, tiles=3, blocks=2)),
        (Case(m=9, n=200, bits=2, group_size=128), mosaic_gpu.Config(3, 2, blocks=2)),
        (Case(k=500, bits=3, group_size=128), mosaic_gpu.Config(2, 2, slices=2, blocks=1)),
        (Case(k=384, n=300, group_size=32), mosaic_gpu.Config(2, 2, tiles=2, blocks=2)),
    ],
    ids=str,
)
def test_hopper_steps_of_other_sizes_match_the_oracle(case, config):
    interpretable("mosaic_gpu", case)
    data = make(case)
    x, *weight = operands(data)
    y = mosaic_gpu.lut_matmul(x, *weight, **case.static, config=config, interpret=True)
    assert relative_error(y, oracle(case, data)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("lookup", ["byte", "mixed", "pair", "lane"])
@pytest.mark.parametrize("bits", [3, 4])
def test_tpu_lookups_agree_bit_for_bit(lookup, bits):
    case = Case(bits=bits, k=256, group_size=32)
    expected = small_tpu(case, "wide")
    np.testing.assert_array_equal(small_tpu(case, lookup), expected)


@pytest.mark.parametrize("lookup", ["byte", "pair"])
def test_tpu_byte_and_pair_lookups_take_a_table_per_column(lookup):
    case = Case(tables="channel", n=256)
    assert relative_error(small_tpu(case, lookup), oracle(case, make(case))) <= 1.1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("m_rows,offsets", [(64, False), (128, True)])
def test_identity_reproduces_the_dense_weight_bit_for_bit(dtype, m_rows, offsets):
    case = Case(m=m_rows, k=m_rows, n=128, group_size=32, dtype=dtype, offsets=offsets)
    data = make(case)
    data["x"] = jnp.eye(case.k, dtype=dtype)
    weight = reference.dequantize(
        *operands(data)[1:], k=case.k, group_size=case.group_size, dtype=jnp.dtype(dtype)
    )
    with interpret_kernels():
        y = lut_matmul(*operands(data), **case.static, implementation="mosaic_tpu")
    np.testing.assert_array_equal(y, weight)


def interpretable(name: str, case: Case) -> None:
    """Skips where this jax cannot interpret the kernel."""
    with interpret_kernels():
        reason = LUT_MATMUL.reason_against(name, operands(make(case)), case.static)
    if reason is not None:
        assert "interpret mode" in reason
        pytest.skip(reason)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "name,bits,dtype",
    [
        ("reference", 3, "float16"),
        ("xla", 2, "bfloat16"),
        ("xla", 4, "float32"),
        ("pallas_triton", 3, "bfloat16"),
        ("pallas_triton", 8, "float32"),
        ("mosaic_gpu", 4, "bfloat16"),
        ("mosaic_gpu", 2, "float16"),
    ],
)
def test_identity_gives_the_weight_and_two_runs_give_equal_bits(name, bits, dtype, transpose):
    case = Case(k=72, n=80, m=80 if transpose else 72, bits=bits, dtype=dtype, transpose=transpose)
    interpretable(name, case)
    data = make(case)
    data["x"] = jnp.eye(case.m, dtype=dtype)
    weight = reference.dequantize(
        *operands(data)[1:], k=case.k, group_size=case.group_size, dtype=jnp.dtype(dtype)
    )
    with interpret_kernels():
        y, again = (
            lut_matmul(*operands(data), **case.static, implementation=name) for _ in range(2)
        )
    np.testing.assert_array_equal(y, weight.T if transpose else weight)
    np.testing.assert_array_equal(y, again)


def test_two_runs_of_the_tpu_kernel_give_equal_bits():
    case = Case(m=5, k=200, n=72, group_size=96, bits=3)
    np.testing.assert_array_equal(small_tpu(case), small_tpu(case))


@pytest.mark.parametrize("p,bits", [(1, 3), (2, 4), (2, 6), (2, 8)])
def test_few_rows_of_the_hopper_kernel_give_the_weight_and_equal_bits(p, bits):
    case = Case(m=40, k=40, n=72, bits=bits, group_size=32, p=p)
    interpretable("mosaic_gpu", case)
    data = make(case)
    data["x"] = jnp.eye(case.k, dtype=case.dtype)
    weight = reference.dequantize(
        *operands(data)[1:], k=case.k, group_size=case.group_size, dtype=jnp.bfloat16
    )
    with interpret_kernels():
        y, again = (
            lut_matmul(*operands(data), **case.static, implementation="mosaic_gpu")
            for _ in range(2)
        )
    np.testing.assert_array_equal(y, weight)
    np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("m", "transpose"), [(1, False), (128, False), (16, True)])
def test_tpu_tiles_fit_every_group_that_is_supported(bits, m, transpose):
    """A tile of which scales are not whole groups would take wrong ones."""
    k, n = 4096, 128
    x = jax.ShapeDtypeStruct((m, n if transpose else k), jnp.bfloat16)
    words = jax.ShapeDtypeStruct((k // 8, bits, n), jnp.uint8)
    lut = jax.ShapeDtypeStruct((1, 2**bits, 1), jnp.float32)
    supported = []
    for group in range(16, k, 16):
        scales = jax.ShapeDtypeStruct((-(-k // group), n), jnp.float32)
        static = {"k": k, "group_size": group, "transpose": transpose}
        if mosaic_tpu.supports(x, words, scales, lut, **static):
            continue
        supported.append(group)
        problem = mosaic_tpu.make_problem(x, words, lut, **static, device_kind="TPU v6 lite")
        block = problem.config.block_k
        assert block % group == 0 or group % block == 0, group
        assert block % 128 == 0 or problem.k_tiles == 1, group
    assert {32, 64, 128, 256, 512, 1024, 2048} <= set(supported)


def test_a_kernel_of_another_platform_is_refused_with_the_way_out():
    args = operands(make(Case()))
    with pytest.raises(NotImplementedError, match=r"kernel for tpu.*interpret_kernels"):
        lut_matmul(*args, k=256, group_size=64, implementation="mosaic_tpu")


def test_the_case_list_is_the_required_one():
    every = {(c.bits, c.dtype) for c in CASES}
    assert {b for b, _ in every} == {2, 3, 4, 8}
    assert {d for _, d in every} == set(lut_cases.TOLERANCE)
    assert {1, 600} <= {c.m for c in CASES}


def test_a_named_kernel_maps_over_experts_and_differentiates():
    case = Case(m=3, k=128, n=128, dtype="float32")
    x, words, scales, lut, _ = operands(make(case))
    experts = (jnp.stack([words, words[..., ::-1]]), jnp.stack([scales, scales * 2]))

    def product(name):
        def f(x, words, scales):
            return lut_matmul(x, words, scales, lut, k=128, group_size=64, implementation=name)

        return f

    def loss(name):
        f = product(name)
        return jax.grad(lambda x, s: jnp.sin(f(x, words, s)).sum(), argnums=(0, 1))(x, scales)

    axes = (None, 0, 0)
    with interpret_kernels():
        mapped = jax.vmap(product("mosaic_tpu"), in_axes=axes)(x, *experts)
        gradients = loss("mosaic_tpu")
    expected = jax.vmap(product("reference"), in_axes=axes)(x, *experts)
    np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-3)
    for a, b in zip(gradients, loss("reference"), strict=True):
        # float32 sums of 128 products in another order, through a sine
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
