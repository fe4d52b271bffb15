"""Experts compile to fused kernels, whether few tokens meet them or many."""

from __future__ import annotations

import functools
import re

import compilers
import jax
import jax.numpy as jnp
import pytest

import lutjax
from pallas_kernels.lut_matmul import packed_matmul, packed_matmul_grouped, prepack

S = jax.ShapeDtypeStruct
EXPERTS = 16
SHAPES = {"qwen3_moe": (2048, 768, 64), "gpt_oss": (2880, 2880, 32)}
"""K, N and the group size."""


@pytest.mark.parametrize(("shape", "rows"), [("qwen3_moe", 8), ("qwen3_moe", 1024), ("gpt_oss", 8)])
@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
def test_experts_compile_to_one_kernel(target, implementation, call, rows, shape):
    k, n, group_size = SHAPES[shape]
    (compilers.need_tpu if target == "v6e" else compilers.need_gpu)()
    kind = compilers.KIND[target] if target == "v6e" else None

    def compress(kernel):
        params = lutjax.quantize({"kernel": kernel}, bits=4, group_size=group_size)
        return lutjax.prepack(params, implementation=implementation, device_kind=kind)["kernel"]

    with compilers.abstract(target):
        experts = jax.eval_shape(compress, S((EXPERTS, k, n), jnp.bfloat16))
    compiled, _ = compilers.compile_for(
        target,
        lutjax.lift(jax.lax.ragged_dot, strict=True),
        S((rows, k), jnp.bfloat16),
        experts,
        S((EXPERTS,), jnp.int32),
    )
    # One kernel for all tiles, which reads the experts where they lie.
    program = compiled.as_text()
    assert program.count(f'custom_call_target="{call}') == 1
    assert " while(" not in program
    made = re.findall(rf"= [us]?(?:32|bf16)\[{EXPERTS},\d+,\d+.*? ([\w-]+)\(", program)
    assert "parameter" in made
    assert set(made) <= {"parameter", "bitcast"}
    if rows < EXPERTS:
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * EXPERTS * k * n / 20


def packed_weight(target, implementation, shape, *, entries=None):
    """A prepacked weight, or a stack of so many."""
    k, n, group_size = SHAPES[shape]
    options = {} if target == "h200" else {"device_kind": compilers.KIND[target]}
    pack = functools.partial(
        prepack, k=k, group_size=group_size, implementation=implementation, **options
    )
    arrays = [
        S((k // 8, 4, n), jnp.uint8),
        S((k // group_size, n), jnp.bfloat16),
        S((1, 16, 1), jnp.float32),
    ]
    if entries is not None:
        pack = jax.vmap(pack)
        arrays = [S((entries, *a.shape), a.dtype) for a in arrays]
    with compilers.abstract(target):
        return jax.eval_shape(pack, *arrays)


def rows_of(shape, *lead):
    return S((*lead, SHAPES[shape][0]), jnp.bfloat16)


def grouped_operands(shape, weight, tiles, rows):
    tile = S((tiles,), jnp.int32)
    return rows_of(shape, tiles, rows), weight, tile, tile


# Bundles of the kernel for eight weights over those for one: measured 1.17 and 1.10 (v6e), 1.07 and
# 1.02 (tpu7x), 1.09 and 1.06 (v5e).
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", ["v6e", "tpu7x", "v5e"])
def test_tpu_bundles_of_several_weights(target, shape):
    compilers.need_tpu()
    one = packed_weight(target, "mosaic_tpu", shape)
    single = compilers.bundles(target, packed_matmul, rows_of(shape, 16), one)
    several = packed_weight(target, "mosaic_tpu", shape, entries=8)
    operands = grouped_operands(shape, several, 8, 16)
    grouped = compilers.bundles(target, packed_matmul_grouped, *operands)
    assert single < grouped <= 1.2 * single


# SASS instructions a code in the main loop by tiles and rows; one weight has 2.73 and 3.94 in the
# first two, as all that several add is outside of it. Many rows may cost 8 (test_hopper_aot.py).
@pytest.mark.parametrize(
    ("shape", "tiles", "rows", "most"),
    [("qwen3_moe", 4, 16, 2.8), ("gpt_oss", 4, 8, 4.0), ("qwen3_moe", 16, 128, 3.1)],
)
def test_hopper_instructions_of_several_weights(shape, tiles, rows, most):
    compilers.need_gpu()
    several = packed_weight("h200", "mosaic_gpu", shape, entries=EXPERTS)
    operands = grouped_operands(shape, several, tiles, rows)
    code = compilers.sass(packed_matmul_grouped, *operands)
    assert code.spills == 0
    assert code.hazards() == []
    loop = code.main_loop()
    assert loop.total() / (8 * loop["HGMMA"]) <= most  # of 16 rows and 64 columns a product
