"""Weights that are packed shard by shard compile to one kernel a device, and nothing moves them."""

import dataclasses
import re

import compilers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax

S = jax.ShapeDtypeStruct
WIDTH, HIDDEN, DEVICES = 4096, 14336, 4
SPECS = {"up": P(None, "model"), "down": P("model", None)}
SHARDS = {"up": (1, DEVICES), "down": (DEVICES, 1)}


def packed_shards(target, implementation):
    """What ``lutjax.prepack`` makes of weights on so many devices, which are not here."""
    kind = None if target == "h200" else compilers.KIND[target]

    def pack(name):
        k, n = (WIDTH, HIDDEN) if name == "up" else (HIDDEN, WIDTH)
        rows, columns = SHARDS[name]

        def one(dense):
            params = lutjax.quantize({"kernel": dense}, bits=4, group_size=128)
            packed = lutjax.prepack(params, implementation=implementation, device_kind=kind)
            return packed["kernel"]

        shard = jax.eval_shape(one, S((k // rows, n // columns), jnp.bfloat16))
        packed = jax.tree.map(lambda a: S((rows, columns, *a.shape), a.dtype), shard.packed)
        return dataclasses.replace(shard, packed=packed, sharded=True)

    with compilers.abstract(target):
        return {name: pack(name) for name in SPECS}


def block(params, x):
    hidden = jax.nn.silu(x @ params["up"])
    return x + jax.lax.psum(hidden @ params["down"], "model")


@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
def test_shards_are_multiplied_where_they_are(target, implementation, call):
    (compilers.need_gpu if target == "h200" else compilers.need_tpu)()
    mesh = Mesh(np.array(compilers.devices(target, DEVICES)), ("model",))
    params = packed_shards(target, implementation)
    dense = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    shardings = lutjax.shardings_like(params, dense)
    params = jax.tree.map(lambda a, s: S(a.shape, a.dtype, sharding=s), params, shardings)
    x = S((16, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    run = jax.shard_map(block, mesh=mesh, in_specs=(SPECS, P()), out_specs=P())
    compiled, _ = compilers.compile_for(target, lutjax.lift(run, strict=True), params, x)
    program = compiled.as_text()
    assert program.count(f'custom_call_target="{call}') == 2
    moved = set(re.findall(r" (all-[\w-]+|collective-[\w-]+)\(", program))
    assert moved and all(name.startswith("all-reduce") for name in moved)
    made = re.findall(r"= [us]32\[\d+,\d+,\d+[\d,]*\]\S* ([\w-]+)\(", program)
    assert "parameter" in made
    assert set(made) <= {"parameter", "bitcast", "copy-done"}  # TPUs fetch the next weight early
    a_quarter = 2 * WIDTH * HIDDEN / DEVICES * 4.2 / 8
    assert compiled.memory_analysis().argument_size_in_bytes < 1.02 * a_quarter
