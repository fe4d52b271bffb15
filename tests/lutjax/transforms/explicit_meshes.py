"""Run by test_explicit_meshes.py in a process of its own: four virtual devices; prints JSON."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax import calibrate
from lutjax.adapters import AdapterArray
from lutjax.linear_maps import Gaussian

SPECS = {"rows": P("x", None), "both": P("x", "y"), "stack": P("x", None, "y")}
SHAPES = {"rows": (128, 48), "both": (128, 64), "stack": (2, 64, 96)}
MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
RECIPES = {
    "nf4": lutjax.Recipe.uniform(4, 32),
    "double_quant": lutjax.Recipe.uniform(3, 16, double_quant=lutjax.DoubleQuant(8, 16)),
    "higgs": lutjax.Recipe.higgs(4, 32),
}


def tree():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def place(params):
    return {k: jax.device_put(v, NamedSharding(MESH, SPECS[k])) for k, v in params.items()}


def compare(expected, found):
    """The largest difference of dense weights, and whether parts are sharded as weights are."""
    shardings = {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()}
    wanted = jax.tree.leaves(lutjax.shardings_like(found, shardings))
    leaves = zip(jax.tree.leaves(found), wanted, strict=True)
    dense = zip(
        jax.tree.leaves(lutjax.materialize(expected)),
        jax.tree.leaves(lutjax.materialize(found)),
        strict=True,
    )
    return {
        "difference": max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in dense),
        "sharded": all(a.sharding.is_equivalent_to(want, a.ndim) for a, want in leaves),
    }


def mesh_context(inside):
    """`jax.set_mesh` or nothing: weights have their mesh in their types anyway."""
    return jax.set_mesh(MESH) if inside else contextlib.nullcontext()


def quantized(recipe, jit, inside=True):
    def run(params):
        return lutjax.quantize(params, recipe)

    run = jax.jit(run) if jit else run
    expected = run(tree())
    with mesh_context(inside):
        return compare(expected, run(place(tree())))


def decomposed(inside=True):
    def run(params):
        return lutjax.decompose(params, RECIPES["nf4"], rank=4, rounds=3, key=jax.random.key(0))

    expected = run(tree())
    with mesh_context(inside):
        return compare(expected, run(place(tree())))


def with_hessians():
    def run(params, moments):
        return lutjax.quantize(params, RECIPES["nf4"], hessians=moments)

    x = jax.random.normal(jax.random.key(1), (256, 128))
    moments = {"rows": x.T @ x}
    expected = run(tree(), moments)
    with jax.set_mesh(MESH):
        return compare(expected, run(place(tree()), moments))


def fisher(keep, samples=None):
    """The largest relative difference from one device, and how often the loss was traced."""
    traced = []

    def loss(params, x):
        traced.append(x)
        return jnp.sum(jnp.tanh(x @ params["rows"])) + jnp.sum(jnp.sin(x @ params["both"]))

    def run(params, batches):
        params = {name: params[name] for name in ("rows", "both")}
        traced.clear()
        found = calibrate.fisher(loss, params, batches, recipe=RECIPES["nf4"], keep=keep)
        return jax.tree.leaves(found.diagonals)

    batches = list(jax.random.normal(jax.random.key(1), (2, 4, 5, 128)))
    expected = run(tree(), batches)
    with jax.set_mesh(MESH):
        if samples is not None:
            batches = [jax.device_put(x, NamedSharding(MESH, samples)) for x in batches]
        found = run(place(tree()), batches)
    worst = max(
        float(np.abs(np.asarray(a) / np.asarray(b) - 1).max())
        for a, b in zip(found, expected, strict=True)
    )
    return {"difference": worst, "traced": len(traced)}


def refused():
    """A weight whose rows do not split into whole blocks."""
    with jax.set_mesh(MESH):
        weight = jax.device_put(jnp.ones((72, 16)), NamedSharding(MESH, P("x", None)))
        try:
            lutjax.quantize({"mlp": {"kernel": weight}}, RECIPES["nf4"])
        except ValueError as error:
            return str(error)
    return ""


def adapter_type():
    """An adapter's product is typed as that of its base."""
    bound = Gaussian(2).init(jax.random.key(0), SHAPES["both"])
    with jax.set_mesh(MESH):
        base = lutjax.quantize(place(tree())["both"], RECIPES["nf4"])
        params = {"kernel": AdapterArray.of(base, bound)}
        run = lutjax.lift(lambda p, x: x @ p["kernel"])
        return list(jax.typeof(jax.jit(run)(params, jnp.ones((4, 128)))).sharding.spec)


def outside_lift():
    """Products with the weight and its transpose, not lifted: sharding, and distance from dense."""
    with jax.set_mesh(MESH):
        weight = lutjax.quantize(place(tree())["both"], RECIPES["nf4"])
        dense = np.asarray(weight.materialize())
        found = []
        for w, matrix in ((weight, dense), (weight.T, dense.T)):
            x = np.ones((4, matrix.shape[0]), np.float32)
            y = jnp.asarray(x) @ w
            distance = float(np.abs(np.asarray(y) - x @ matrix).max())
            found.append([list(y.sharding.spec), distance])
        return found


print(
    json.dumps(
        {
            **{name: quantized(recipe, jit=False) for name, recipe in RECIPES.items()},
            "under jit": quantized(RECIPES["nf4"], jit=True),
            "without set_mesh": quantized(RECIPES["nf4"], jit=False, inside=False),
            "under jit without set_mesh": quantized(RECIPES["nf4"], jit=True, inside=False),
            "decompose": decomposed(),
            "decompose without set_mesh": decomposed(inside=False),
            "hessians": with_hessians(),
            "fisher means": fisher("means"),
            "fisher full": fisher("full"),
            "fisher split samples": fisher("means", P("x")),
            "refused": refused(),
            "adapter": adapter_type(),
            "outside lift": outside_lift(),
        }
    )
)
