"""Experts compile to fused kernels, whether few tokens meet them or many."""

import re

import compilers
import jax
import jax.numpy as jnp
import pytest

import lutjax

S = jax.ShapeDtypeStruct
EXPERTS = 16
SHAPES = {"qwen3_moe": (2048, 768, 64), "gpt_oss": (2880, 2880, 32)}
"""K, N and the group size."""


@pytest.mark.parametrize(("shape", "rows"), [("qwen3_moe", 8), ("qwen3_moe", 1024), ("gpt_oss", 8)])
@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
def test_experts_compile_to_kernels(target, implementation, call, rows, shape):
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
    program = compiled.as_text()
    if target == "v6e":  # one kernel for all tiles, which reads the experts where they lie
        assert program.count(f'custom_call_target="{call}') == 1
        assert " while(" not in program
        made = re.findall(rf"= (?:s32|bf16)\[{EXPERTS},\d+,\d+.*? ([\w-]+)\(", program)
        assert set(made) == {"parameter"}
    assert f'custom_call_target="{call}' in program
    dense = 2 * EXPERTS * k * n
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 3
