"""``sparse_matmul`` as a JAX function: transformations, gradients, dispatch and bad input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sparse_cases import Case, make

from pallas_kernels.sparse_matmul import (
    IMPLEMENTATIONS,
    RowCodes,
    dequantize_rows,
    pack_rows,
    sparse_matmul,
    unpack_rows,
)

DENSE = Case(m=3, k=40, n=24, dtype="float32", per_row=True)
CODES = Case(m=2, k=40, n=24, bits=4, group_size=16, dtype="float32", offsets=True, lanes=8)


def masked(x, weight, thresholds):
    dense = dequantize_rows(weight) if isinstance(weight, RowCodes) else weight
    return jnp.where(jnp.abs(x) > thresholds[None], x, 0.0) @ dense


@pytest.mark.parametrize("case", [DENSE, CODES], ids=str)
def test_gradients_are_those_of_the_masked_product(case):
    (x, weight, thresholds), _ = make(case)

    def grads(function):
        def loss(x, weight, thresholds):
            return jnp.sum(jnp.sin(function(x, weight, thresholds)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))(x, weight, thresholds)

    actual, expected = grads(sparse_matmul), grads(masked)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        # sin of sums of 40 products in float32, computed in another order
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    dead = np.abs(x) <= np.asarray(thresholds)[None]
    assert dead.any() and not np.asarray(actual[0])[dead].any()


@pytest.mark.parametrize("case", [DENSE, CODES], ids=str)
def test_gradients_of_gradients(case):
    (x, weight, thresholds), _ = make(case)

    def slope(function):
        def loss(x):
            return jnp.sum(jnp.sin(function(x, weight, thresholds)))

        return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(x)

    actual, expected = slope(sparse_matmul), slope(masked)
    # sums of sums of 40 products in float32, computed in another order
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", [DENSE, CODES], ids=str)
def test_vmap_over_activations_and_weights(case):
    (x, weight, thresholds), _ = make(case)
    xs = jnp.stack([x, -x])
    np.testing.assert_allclose(
        jax.vmap(sparse_matmul, in_axes=(0, None, None))(xs, weight, thresholds)[1],
        -sparse_matmul(x, weight, thresholds),
        rtol=1e-5,
        atol=1e-5,
    )
    two = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    levels = jnp.stack([thresholds, 0 * thresholds])
    both = jax.jit(jax.vmap(sparse_matmul, in_axes=(None, 0, 0)))(x, two, levels)
    for y, level in zip(both, levels, strict=True):
        np.testing.assert_allclose(y, sparse_matmul(x, weight, level), rtol=1e-5, atol=1e-5)
    summed = jax.grad(
        lambda w: jax.vmap(sparse_matmul, in_axes=(None, 0, 0))(x, w, levels).sum(), allow_int=True
    )
    assert all(
        a.shape == b.shape for a, b in zip(*map(jax.tree.leaves, (summed(two), two)), strict=True)
    )


def test_thresholds_are_data():
    (x, weight, _), _ = make(Case(dtype="float32"))
    count = 0

    @jax.jit
    def f(x, weight, threshold):
        nonlocal count
        count += 1
        return sparse_matmul(x, weight, threshold)

    for threshold in (0.0, 0.5, 1.0):
        y = f(x, weight, threshold)
        np.testing.assert_allclose(
            y, jnp.where(jnp.abs(x) > threshold, x, 0.0) @ weight, rtol=1e-4, atol=1e-4
        )
    assert count == 1


def test_scan_over_layers():
    (x, _, _), _ = make(Case(k=32, dtype="float32"))
    weights = jax.random.normal(jax.random.key(0), (3, 32, 32)) / 6

    def layer(x, weight):
        return jnp.tanh(sparse_matmul(x, weight, 0.3)), None

    expected = x
    for weight in weights:
        expected = jnp.tanh(jnp.where(jnp.abs(expected) > 0.3, expected, 0.0) @ weight)
    y, _ = jax.jit(lambda x: jax.lax.scan(layer, x, weights))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_sharded(axis):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    (x, weight, _), _ = make(Case(dtype="float32", k=64, n=128))
    expected = jnp.where(jnp.abs(x) > 0.7, x, 0.0) @ weight
    if axis == "columns":
        f, specs, out = sparse_matmul, (P(), P(None, "model"), P()), P(None, "model")
    else:
        specs, out = (P(None, "model"), P("model"), P()), P()

        def f(x, weight, t):
            return jax.lax.psum(sparse_matmul(x, weight, t), "model")

    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)
    np.testing.assert_allclose(
        jax.jit(mapped)(x, weight, jnp.float32(0.7)), expected, rtol=1e-5, atol=1e-4
    )
    sharding = jax.sharding.NamedSharding(mesh, specs[1])
    y = jax.jit(sparse_matmul)(x, jax.device_put(weight, sharding), jnp.float32(0.7))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lanes", [None, 4])
def test_packing_round_trip(bits, lanes):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 5, 77))
    words = pack_rows(jnp.asarray(codes), bits, lanes)
    np.testing.assert_array_equal(unpack_rows(words, bits, 77), codes)
    # bits a code, up to the padding of the last block
    assert words.nbytes * 8 <= codes.size * bits * 1.25 + 8 * 10 * 4 * (lanes or 1)


def test_leading_axes_and_no_rows():
    (x, weight, t), _ = make(Case(dtype="float32"))
    assert sparse_matmul(x[0], weight, t).shape == (256,)
    assert sparse_matmul(x[:0], weight, t).shape == (0, 256)
    assert sparse_matmul(x, weight[:, :0], t).shape == (1, 0)
    assert sparse_matmul(x.reshape(1, 1, -1), weight, t).shape == (1, 1, 256)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": lambda x: x[:, :-1]}, r"x of shape \(2, 39\) must end in K=40"),
        ({"x": lambda x: x.astype(jnp.int32)}, "x must be floating point, got int32"),
        ({"t": lambda t: t[:-1]}, r"thresholds of shape \(39,\) must have shape"),
        ({"words": lambda w: w.astype(jnp.uint8)}, "words must be uint32"),
        ({"words": lambda w: w[:, :-1]}, "N=24 needs"),
        ({"lut": lambda t: t[:, :5]}, r"lut of shape \(1, 5, 1\)"),
        ({"scales": lambda s: s[:-1]}, r"scales of shape \(2, 24\) must have shape \(3, N\)"),
        ({"offsets": lambda s: s[:, :-1]}, r"offsets of shape \(3, 23\)"),
        ({"weight": lambda w: jnp.ones((2, 3, 4, 5))}, "map over leading axes with jax.vmap"),
    ],
)
def test_bad_arguments(change, message):
    case = dataclasses.replace(CODES, per_row=True, lanes=3)
    (x, weight, t), _ = make(case)
    same = lambda a: a  # noqa: E731
    for field in ("words", "lut", "scales", "offsets"):
        value = change.get(field, same)(getattr(weight, field))
        weight = dataclasses.replace(weight, **{field: value})
    weight = change.get("weight", same)(weight)
    x, t = change.get("x", same)(x), change.get("t", same)(t)
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_matmul(x, weight, t)


def test_bad_implementation():
    (x, weight, t), _ = make(Case(m=9, dtype="float32"))
    with pytest.raises(ValueError, match="implementation='nope' is unknown"):
        sparse_matmul(x, weight, t, implementation="nope")
    reasons = {"xla": "9 rows", "pallas_triton": "it is a kernel for cuda", "mosaic_tpu": "it is"}
    for name, reason in reasons.items():
        with pytest.raises(
            NotImplementedError, match=f"'{name}' cannot run this product: {reason}"
        ):
            sparse_matmul(x, weight, t, implementation=name)
    for name in IMPLEMENTATIONS[:2]:
        assert sparse_matmul(x, weight, t, implementation=name).shape == (9, 256)
