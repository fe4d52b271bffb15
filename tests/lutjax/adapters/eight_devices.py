"""Run by test_distributed.py in a process of its own: eight virtual CPU devices; prints JSON."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from lutjax import linear_maps as lm
from lutjax.adapters import dual, merge_workers, start_worker
from lutjax.optim import project

K, N, RANK, WORKERS = 64, 96, 4, 8
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(compiled):
    """(operation, elements, whether in the entry computation) of all collectives of the HLO."""
    found, entry = [], False
    for line in compiled.as_text().splitlines():
        if line.startswith("ENTRY"):
            entry = True
        elif line.startswith("}"):
            entry = False
        match = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all)\(", line)
        if match:
            for _, sizes in SHAPE.findall(match[1]):
                size = math.prod(int(s) for s in sizes.split(",") if s)
                found.append((match[2], size, entry))
    return found


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"][None] - y) ** 2)


def problem():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(K, N)), jnp.float32), "b": jnp.zeros(N)}
    x = jnp.asarray(rng.normal(size=(64, K)), jnp.float32)
    return params, x, jnp.asarray(rng.normal(size=(64, N)), jnp.float32)


def data_parallel(mesh, map_):
    """Steps with the gradient reduced in the latent space, against one device with all the data."""

    def run(axis_name, params, x, y):
        optimizer = project(optax.adam(1e-2), map_, refresh_every=3, axis_name=axis_name)

        def step(params, state, x, y):
            gradients = jax.grad(loss)(params, x, y)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        if axis_name is not None:
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), P(), P("data"), P("data")),
                out_specs=P(),
                check_vma=False,
            )
        step = jax.jit(step).lower(params, state, x, y).compile()
        for _ in range(5):
            params, state = step(params, state, x, y)
        return params, step

    sharded, step = run("data", *problem())
    alone, _ = run(None, *problem())
    return {
        "difference": float(jnp.max(jnp.abs(sharded["w"] - alone["w"]))),
        "collectives": collectives(step),
    }


def workers(mesh, map_):
    """Local steps with a map for each worker, then a merge, against the same in numpy."""
    training = dual(project(optax.sgd(1.0), map_, refresh_every=None, key=1))
    params, x, y = problem()
    state = training.init(params)

    def local(state, x, y):
        state = start_worker(training, state, "data")
        for _ in range(3):
            gradients = jax.grad(lambda r, state=state: loss(training.weights(state, r), x, y))(
                state.latents
            )
            state = training.update(gradients, state)
        return jax.tree.map(lambda a: a[None], state)

    def merge(stacked):
        state = merge_workers(training, jax.tree.map(lambda a: a[0], stacked), "data")
        return jax.tree.map(lambda a: a[None], state)

    def spread(f, specs):
        return jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
        )

    local_step = spread(local, (P(), P("data"), P("data"))).lower(state, x, y).compile()
    states = local_step(state, x, y)
    merge_step = spread(merge, (P("data"),)).lower(states).compile()
    merged = merge_step(states)
    each = [training.weights(jax.tree.map(lambda a, i=i: a[i], states)) for i in range(WORKERS)]
    expected = {k: np.mean([w[k] for w in each], axis=0) for k in params}
    bases = np.stack([np.asarray(states.maps["w"].for_worker(i).basis[i]) for i in range(WORKERS)])
    joint = np.concatenate(list(bases), axis=1)
    return {
        "difference": max(
            float(np.abs(np.asarray(merged.base[k]) - expected[k][None]).max()) for k in params
        ),
        "moved": float(np.abs(expected["w"] - np.asarray(params["w"])).max()),
        "local": collectives(local_step),
        "merge": collectives(merge_step),
        "joint_rank": int(np.linalg.matrix_rank(joint)),
    }


mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
print(
    json.dumps(
        {
            "gaussian": data_parallel(mesh, lm.Gaussian(RANK)),
            "svd": data_parallel(mesh, lm.SVD(RANK)),
            "workers": workers(mesh, lm.SemiOrthogonal(RANK)),
        }
    )
)
