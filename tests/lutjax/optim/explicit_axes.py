"""Run by test_explicit_axes.py in a process of its own: four virtual devices; prints JSON."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax import optim
from lutjax.linear_maps import Gaussian

SPECS = {"rows": P("x", None), "columns": P(None, "x"), "stack": P("x", None, None), "bias": P()}
SHAPES = {"rows": (128, 160), "columns": (128, 160), "stack": (4, 64, 96), "bias": (160,)}
SIZES = {"rank": 16, "refresh_every": 2}
OPTIMIZERS = {
    "galore": lambda: optim.galore(1e-2, **SIZES, on_refresh="rotate"),
    "galore_8bit": lambda: optim.quantized_state(
        optim.galore(1e-2, **SIZES, exact_svd=True), block=8, min_size=1024
    ),
    "flora": lambda: optim.flora(1e-2, **SIZES),
    "lift": lambda: optim.lift(1e-2, rank=4, budget_rank=2, refresh_every=2),
    "adam_8bit": lambda: optim.quantized_state(optax.adam(1e-2), block=8, min_size=1024),
    "plateau": lambda: optim.project(
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()), Gaussian(16)
    ),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def run(optimizer, params, gradients, jit=True):
    # Without `jax.set_mesh` JAX has no mesh for a compiled function that uses no argument's values.
    state = (jax.jit(optimizer.init) if jit else optimizer.init)(params)
    extra = {"value": jnp.float32(1.0)}  # which only "plateau" uses
    step = jax.jit(optax.with_extra_args_support(optimizer).update)
    for _ in range(3):
        updates, state = jax.block_until_ready(step(gradients, state, params, **extra))
    return updates, state


def moments(state):
    """How the moments of the parameter ``columns`` are kept: as codes or not, and split or not."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lutjax.is_compressed)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        if name.endswith((".mu['columns']", ".nu['columns']")):
            numbers = leaf.words if lutjax.is_compressed(leaf) else leaf
            yield lutjax.is_compressed(leaf), not numbers.sharding.is_fully_replicated


def compare(name, inside=True):
    """The difference from one device, and how updates and moments are sharded."""
    expected, _ = run(OPTIMIZERS[name](), tree(0), tree(1))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        placed = [
            {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in tree(seed).items()}
            for seed in (0, 1)
        ]
        updates, state = run(OPTIMIZERS[name](), *placed, jit=inside)
    difference = max(float(np.abs(updates[k] - expected[k]).max()) for k in SPECS)
    kept = {
        k: updates[k].sharding.is_equivalent_to(placed[0][k].sharding, updates[k].ndim)
        for k in SPECS
    }
    return {"difference": difference, "kept": all(kept.values()), "moments": [*moments(state)]}


results = {name: compare(name) for name in OPTIMIZERS}
results["without set_mesh"] = compare("adam_8bit", inside=False)
print(json.dumps(results))
