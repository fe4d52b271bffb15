"""Which implementations are traced, and what programs for several platforms compute."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.layout import pack
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.sparse_matmul import RowCodes, pack_rows, sparse_matmul

K, N, GROUP = 128, 96, 32


def parts():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.randint(keys[0], (K, N), 0, 16),
        jax.random.uniform(keys[1], (K // GROUP, N)),
        jax.random.normal(keys[2], (1, 16, 1)),
        jax.random.normal(keys[3], (2, K)),
    )


def lut_product():
    codes, scales, lut, x = parts()
    return functools.partial(lut_matmul, k=K, group_size=GROUP), (x, pack(codes, 4), scales, lut)


def sparse_product():
    """In the layout that the kernel for GPUs reads."""
    codes, scales, lut, x = parts()
    weight = RowCodes(pack_rows(codes, 4, lanes=32), scales, lut, None, GROUP)
    return sparse_matmul, (x, weight, jnp.float32(0.5))


OPERATIONS = pytest.mark.parametrize("operation", [lut_product, sparse_product])


@OPERATIONS
def test_kernels_are_traced_only_for_the_platform_that_is_compiled_for(operation):
    product, arrays = operation()
    if jax.default_backend() == "cpu":
        assert "pallas_call" not in str(jax.make_jaxpr(product)(*arrays))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        program = str(jax.make_jaxpr(product)(*arrays))
    assert "pallas_call" in program or "triton_kernel_call" in program


@OPERATIONS
def test_a_program_for_several_platforms(operation):
    product, arrays = operation()
    allowed = [jax.export.DisabledSafetyCheck.custom_call(native.LUT_MATMUL)]
    export = jax.export.export(
        jax.jit(product), platforms=("cpu", "cuda", "tpu"), disabled_checks=allowed
    )
    y = jax.jit(export(*arrays).call)(*arrays)
    expected = product(*arrays, implementation="reference")
    # sums of 128 products in float32, in another order
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
