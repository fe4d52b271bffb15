"""Run with several devices: columns that the compiler splits over them are not brought together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lut_cases import Case, make, operands, oracle, relative_error

from pallas_kernels import platforms
from pallas_kernels.lut_matmul import take_columns, xla

assert jax.device_count() == 4
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def place(array, *axes):
    return jax.device_put(array, NamedSharding(MESH, PartitionSpec(*axes)))


def compiled(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    assert "all-gather" not in program.as_text()
    return program


for m in (1, 9):
    case = Case(m=m, k=64, n=32768, dtype="float32")
    x, words, scales, lut, _ = operands(make(case))
    arguments = place(x), place(words, None, None, "d"), place(scales, None, "d"), place(lut)
    y = compiled(functools.partial(xla.lut_matmul, **case.static), *arguments)(*arguments)
    assert relative_error(y, oracle(case, make(case))) < 1e-5

array = jnp.arange(4 * 4096.0).reshape(4, 4096)
arguments = place(array, None, "d"), jnp.array([3, 4095, 2048])
platforms.compiling_for = lambda platform: platform == "tpu"
np.testing.assert_array_equal(
    compiled(take_columns, *arguments)(*arguments), array[:, arguments[1]]
)
print("PASSED")
