"""Run by test_explicit_axes.py in a process of its own: four virtual devices; prints JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lutjax import optim

SPECS = {"rows": P("x", None), "columns": P(None, "x"), "stack": P("x", None, None), "bias": P()}
SHAPES = {"rows": (32, 48), "columns": (32, 48), "stack": (4, 16, 24), "bias": (48,)}
OPTIMIZERS = {
    "galore": lambda: optim.galore(1e-2, rank=4, refresh_every=2, on_refresh="rotate"),
    "galore_8bit": lambda: optim.quantized_state(
        optim.galore(1e-2, rank=4, refresh_every=2, exact_svd=True), min_size=64, block=8
    ),
    "flora": lambda: optim.flora(1e-2, rank=4, refresh_every=2),
    "lift": lambda: optim.lift(1e-2, rank=4, budget_rank=2, refresh_every=2),
    "adam_8bit": lambda: optim.quantized_state(optax.adam(1e-2), min_size=64, block=8),
}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def run(optimizer, params, gradients):
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = jax.block_until_ready(step(gradients, state, params))
    return updates, state


def compare(name):
    """The difference from one device, and the shardings of updates and of the largest state."""
    expected, _ = run(OPTIMIZERS[name](), tree(0), tree(1))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [
            {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in tree(seed).items()}
            for seed in (0, 1)
        ]
        updates, state = run(OPTIMIZERS[name](), *placed)
    difference = max(float(np.abs(updates[k] - expected[k]).max()) for k in SPECS)
    kept = {
        k: updates[k].sharding.is_equivalent_to(placed[0][k].sharding, updates[k].ndim)
        for k in SPECS
    }
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    return {"difference": difference, "kept": all(kept.values()), "split": split}


print(json.dumps({name: compare(name) for name in OPTIMIZERS}))
