"""One of two processes on the loopback interface; started by ``test_lift_sharding.py``."""

import sys

import jax

port, index = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))

# The process must join before anything asks for devices.
# ruff: noqa: E402
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_programs import SPECS, WIDTH, make_params, mlp, normal

import lutjax

assert jax.device_count() == 8 and jax.local_device_count() == 4
params, x = make_params(), np.asarray(normal(2, 16, WIDTH))
expected = mlp(lutjax.materialize(params), x)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
dense = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)


def spread(array, sharding):
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])


sharded = jax.tree.map(spread, params, lutjax.shardings_like(params, dense))
rows = spread(x, NamedSharding(mesh, P("data", None)))
y = jax.jit(lutjax.lift(mlp, strict=True))(sharded, rows)
whole = multihost_utils.process_allgather(y, tiled=True)
np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=2e-5)
print("PASSED", index)
