"""Experts compile to fused kernels, whether few tokens meet them or many."""

import compilers
import jax
import jax.numpy as jnp
import pytest

import lutjax

S = jax.ShapeDtypeStruct
EXPERTS, K, N = 16, 2048, 768


@pytest.mark.parametrize("rows", [8, 1024])
@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
def test_experts_compile_to_kernels(target, implementation, call, rows):
    (compilers.need_tpu if target == "v6e" else compilers.need_gpu)()
    kind = compilers.KIND[target] if target == "v6e" else None

    def compress(kernel):
        params = lutjax.quantize({"kernel": kernel}, bits=4, group_size=64)
        return lutjax.prepack(params, implementation=implementation, device_kind=kind)["kernel"]

    with compilers.abstract(target):
        experts = jax.eval_shape(compress, S((EXPERTS, K, N), jnp.bfloat16))
    compiled, _ = compilers.compile_for(
        target,
        lutjax.lift(jax.lax.ragged_dot, strict=True),
        S((rows, K), jnp.bfloat16),
        experts,
        S((EXPERTS,), jnp.int32),
    )
    assert f'custom_call_target="{call}' in compiled.as_text()
    dense = 2 * EXPERTS * K * N
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 3
