"""The Hopper kernels compile for an H200, within bounds on their instructions.

Nothing runs here: "compiles", never "runs" or "fast".
"""

from __future__ import annotations

import dataclasses
import functools
import re

import compilers
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.lut_matmul import (
    lut_matmul,
    mosaic_gpu,
    mosaic_gpu_tile,
    packed_matmul,
    prepack,
)

S = jax.ShapeDtypeStruct
K = N = 4096


def shapes(m, bits, group, dtype=jnp.bfloat16, *, transpose=False):
    return (
        S((m, N if transpose else K), dtype),
        S((K // 8, bits, N), jnp.uint8),
        S((K // group, N), jnp.float32),
        S((1, 2**bits, 1), jnp.float32),
    )


def compiled_kernel(
    m, bits, group, *, p=1, k=K, n=N, scale_dtype="float32", transpose=False, config=None
):
    """The machine code of the kernel on prepacked operands, and the problem it solves.

    ``bits`` are those of a row of the weight, ``p`` the rows of a code.
    """
    words = S((k // 8 // p, bits * p, n), jnp.uint8)
    with compilers.abstract("h200"):
        problem = mosaic_gpu.make_problem(
            m, words, k=k, group_size=group, p=p, transpose=transpose, config=config
        )
    packed = jax.eval_shape(
        lambda *weight: mosaic_gpu.prepack(*weight, problem, jnp.bfloat16),
        words,
        S((k // group, n), scale_dtype),
        S((1, 2 ** (bits * p), p), jnp.float32),
    )
    out_dtype = jnp.bfloat16 if isinstance(problem, mosaic_gpu_tile.Problem) else jnp.float32
    code = compilers.sass(
        lambda x, packed: mosaic_gpu.apply(x, packed, problem, out_dtype=out_dtype),
        S((m, n if transpose else k), jnp.bfloat16),
        packed,
    )
    return code, problem


# SASS instructions a code in the main loop, with those that write the sums once in many rounds;
# (bits, rows of a code): measured 2.42 2.90 2.39 3.94, and 1.86 2.84 for two rows a code, where the
# kernel of 4 bits is the same.
INSTRUCTIONS = {
    (2, 1): 2.5,
    (3, 1): 2.95,
    (4, 1): 2.5,
    (8, 1): 4.0,
    (2, 2): 2.0,
    (3, 2): 2.9,
}


@pytest.mark.parametrize("bits,p", INSTRUCTIONS)
def test_hopper_instructions_per_code(bits, p):
    compilers.need_gpu()
    code, problem = compiled_kernel(16, bits, 128, p=p)
    assert code.spills == 0
    warpgroups = problem.config.warpgroups
    assert code.registers_asked(warpgroups) <= (warpgroups + 1) * code.registers
    parts = problem.config.tiles * problem.config.slices  # of 64 columns and 128 rows
    codes_a_thread = parts * 64 * mosaic_gpu.SLICE_K / 128
    loop = code.main_loop()
    assert loop["HGMMA"] == 8 * parts  # the loop is the one meant
    assert loop.total() / codes_a_thread <= INSTRUCTIONS[bits, p]
    assert code.products_in_flight() == {0, 1}  # only the last of a step is waited for
    assert code.hazards() == []
    code.code = [
        dataclasses.replace(one, operands=one.operands.replace(", 0x0", ", 0x1"))
        if one.opcode.startswith("WARPGROUP.DEPBAR")
        else one
        for one in code.code
    ]
    assert len(code.hazards()) > 10  # where it is waited for one product less


# Many rows: a code of a tile of 128 rows may cost 8 instructions while the tensor cores multiply.
# (bits, dtype of the scales, transposed): measured 2.37 2.80 1.89 4.81, 4.9, 3.23.
TILE_INSTRUCTIONS = {
    (4, "bfloat16", False): 2.5,
    (3, "bfloat16", False): 3.0,
    (2, "bfloat16", False): 2.0,
    (8, "bfloat16", False): 5.1,
    (4, "float32", False): 5.2,
    (4, "bfloat16", True): 3.4,
}


@pytest.mark.parametrize("bits,scale_dtype,transpose", TILE_INSTRUCTIONS, ids=str)
def test_hopper_tile_instructions_per_code(bits, scale_dtype, transpose):
    compilers.need_gpu()
    config = mosaic_gpu_tile.Config(rows=128, tiles=1 if bits == 8 else 2, stages=3)
    code, _ = compiled_kernel(
        512, bits, 128, scale_dtype=scale_dtype, transpose=transpose, config=config
    )
    assert code.spills == 0
    warpgroups = mosaic_gpu_tile._WARPGROUPS
    assert code.registers_asked(warpgroups) <= (warpgroups + 1) * code.registers
    loop = code.main_loop()
    assert loop["HGMMA"] == 8 * config.tiles
    codes_a_thread = 64 * config.tiles * mosaic_gpu.SLICE_K / 128
    assert loop.total() / codes_a_thread <= TILE_INSTRUCTIONS[bits, scale_dtype, transpose]
    assert code.products_in_flight() == {1}  # the next weights are looked up meanwhile
    assert code.hazards() == []


@pytest.mark.parametrize(
    "m,bits,group,dtype,transpose",
    [
        (1, 4, 128, jnp.bfloat16, False),
        (13, 3, 128, jnp.float16, False),
        (64, 4, 32, jnp.float16, False),
        (512, 2, 256, jnp.bfloat16, False),
        (130, 3, 16, jnp.float16, False),
        (5, 8, K, jnp.bfloat16, True),
        (600, 2, 64, jnp.float16, True),
    ],
)
def test_hopper_kernel_compiles_through_the_public_function(m, bits, group, dtype, transpose):
    compilers.need_gpu()
    static = {"k": K, "group_size": group, "transpose": transpose}
    compiled, _ = compilers.compile_for(
        "h200",
        lambda *a: lut_matmul(*a, **static, implementation="mosaic_gpu"),
        *shapes(m, bits, group, dtype, transpose=transpose),
    )
    assert 'custom_call_target="mosaic_gpu' in compiled.as_text()


@pytest.mark.parametrize("m,bits", [(512, 4), (64, 8)])
def test_hopper_prepacked_weight_serves_other_rows_without_spills(m, bits):
    compilers.need_gpu()
    x, words, scales, lut = shapes(m, bits, 128)
    pack = functools.partial(prepack, k=K, group_size=128, implementation="mosaic_gpu")
    with compilers.abstract("h200"):
        weight = jax.eval_shape(pack, words, scales, lut)
    assert compilers.sass(packed_matmul, x, weight).spills == 0


@pytest.mark.parametrize("warpgroups,tiles", [(3, 1), (1, 3)])
def test_the_last_columns_may_be_fewer_than_a_step_has(warpgroups, tiles):
    compilers.need_gpu()
    config = mosaic_gpu.Config(warpgroups, 3, tiles=tiles)
    code, problem = compiled_kernel(16, 4, 128, config=config)
    assert problem.padded_n % problem.config.block_n and problem.config == config
    assert code.main_loop()["HGMMA"] == 8 * tiles


def test_four_warpgroups_would_wait_for_registers_forever():
    compilers.need_gpu()
    code, _ = compiled_kernel(16, 4, 128, config=mosaic_gpu.Config(4, 3))
    assert code.registers_asked(4) > 5 * code.registers


@pytest.mark.parametrize(
    "m,bits,group,n",
    [
        *((64, 2, 128, 28672), (64, 3, 128, 28672), (64, 4, 64, 28672)),
        *((48, 3, 64, 28672), (48, 4, 32, 28672), (32, 3, 16, 28672)),
        *((64, 4, 64, 896), (64, 4, 32, 896), (56, 3, 32, 896), (40, 4, 16, 896), (64, 4, 16, 896)),
    ],
)
def test_the_heuristic_avoids_spills_and_products_that_wait(m, bits, group, n):
    compilers.need_gpu()
    code, _ = compiled_kernel(m, bits, group, k=3072, n=n, scale_dtype="bfloat16")
    assert code.spills == 0
    assert code.products_in_flight() != {0}


def test_more_products_than_registers_spill():
    compilers.need_gpu()
    config = mosaic_gpu.Config(2, 2, tiles=2, slices=2)
    code, _ = compiled_kernel(64, 3, 64, scale_dtype="bfloat16", config=config)
    assert code.spills > 0


@pytest.mark.parametrize(
    "m,bits,group,k,n,scale_dtype",
    [
        (16, 4, 16, 14336, 4096, "bfloat16"),
        (64, 2, 16, 4096, 28672, "bfloat16"),
        (16, 4, 32, 4096, 28672, "float32"),
        (512, 4, 16, 4096, 28672, "float32"),
    ],
)
def test_scales_of_small_groups_fit_shared_memory(m, bits, group, k, n, scale_dtype):
    compilers.need_gpu()
    code, _ = compiled_kernel(m, bits, group, k=k, n=n, scale_dtype=scale_dtype)
    assert code.main_loop()["HGMMA"]


def test_a_kernel_with_too_much_shared_memory_does_not_compile():
    compilers.need_gpu()
    config = mosaic_gpu.Config(warpgroups=2, stages=16, tiles=2)
    with pytest.raises(Exception, match=r"(?i)shared memory|smem"):
        compiled_kernel(16, 4, 128, k=4 * K, config=config)


@pytest.mark.parametrize("m", [16, 512])
def test_bias_and_low_rank_terms_are_added_in_one_pass_after_the_kernel(m):
    compilers.need_gpu()
    x, words, scales, lut = shapes(m, 4, 128)
    pack = functools.partial(prepack, k=K, group_size=128, implementation="mosaic_gpu")
    with compilers.abstract("h200"):
        weight = jax.eval_shape(pack, words, scales, lut)

    def product(x, weight, left, right, bias):
        return packed_matmul(x, weight) + (x @ left) @ right + bias[None]

    factors = (S((K, 32), x.dtype), S((32, N), x.dtype), S((N,), x.dtype))
    compiled, _ = compilers.compile_for("h200", product, x, weight, *factors)
    text = compiled.as_text()
    lines = text[text.index("ENTRY") :].splitlines()
    (kernel,) = (line.split()[0] for line in lines if "mosaic_gpu" in line)
    users = [line for line in lines if re.search(re.escape(kernel) + r"\b", line.split("=", 1)[-1])]
    assert len(users) == 1 and users[0].strip().startswith("ROOT") and " fusion(" in users[0]
    assert re.search(r"%bias\b|%bias\.\d", users[0]) is not None
