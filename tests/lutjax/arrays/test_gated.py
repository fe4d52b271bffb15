"""Gated weights: numbers, views, stacks, transformations, lift."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax.arrays import (
    DenseArray,
    GatedArray,
    LowRankArray,
    MatrixView,
    RowDenseArray,
    RowLutArray,
    SumArray,
)
from lutjax.arrays.sharding import part_specs

K, N = 64, 24


def weight(seed=0):
    return jax.random.normal(jax.random.key(seed), (K, N))


def inners():
    w = weight()
    lut = lutjax.quantize(w, bits=4, group_size=32)
    low_rank = LowRankArray.of(w[:, :3], w[:3, :N])
    return {
        "dense": DenseArray.of(w),
        "lut": lut,
        "rows": RowLutArray.of(lut),
        "rotated": lutjax.quantize(w, lutjax.Recipe.higgs(4, 32)),
        "low rank": low_rank,
        "sum": SumArray.of(lut, low_rank),
        "sum of rows": SumArray.of(RowLutArray.of(lut), low_rank),
    }


@pytest.mark.parametrize("name", inners())
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("norms", [False, True])
def test_product_masks_its_input(name, rows, norms):
    inner = inners()[name]
    x = np.random.default_rng(0).standard_normal((rows, K)).astype(np.float32)
    scale = np.linalg.norm(np.asarray(inner.materialize(), np.float64), axis=1) if norms else 1.0
    threshold = float(np.median(np.abs(x) * scale))
    gated = GatedArray.of(inner, threshold, jnp.asarray(scale, jnp.float32) if norms else None)
    masked = np.where(np.abs(x) * scale > np.float32(threshold), x, 0)
    expected = masked.astype(np.float64) @ np.asarray(inner.materialize(), np.float64)
    # float32 sums of 64 products
    np.testing.assert_allclose(gated.matmul(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(gated.materialize(), inner.materialize())
    ignored = np.asarray(gated.ignored(jnp.asarray(x)))
    assert ignored.mean() == pytest.approx(0.5, abs=0.02)
    assert (masked[ignored] == 0).all()
    assert gated.nbytes == inner.nbytes + 4 + (4 * K if norms else 0)


def test_buffers_are_shared():
    w = weight()
    assert DenseArray.of(w).matrix is w


def test_gradient_is_masked_and_threshold_gets_none():
    gated = GatedArray.of(DenseArray.of(weight()), 0.7)
    x = jax.random.normal(jax.random.key(1), (3, K))
    grad = jax.grad(lambda x: jnp.sum(gated.matmul(x)))(x)
    expected = jnp.where(jnp.abs(x) > 0.7, weight().sum(axis=1)[None], 0.0)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
    of_weight = jax.grad(lambda w: jnp.sum(w.matmul(x)))(gated)
    assert float(of_weight.threshold) == 0.0


@pytest.mark.parametrize("kind", ["dense", "lut", "rows"])
def test_stacked_weights_have_a_threshold_each(kind):
    w = jnp.stack([weight(i) for i in range(3)])
    inner = DenseArray.of(w, 1)
    if kind != "dense":
        inner = lutjax.quantize(w, bits=3, group_size=32)
        inner = RowLutArray.of(inner) if kind == "rows" else inner
    gated = GatedArray.of(inner, np.array([0.0, 0.5, 1.0]))
    x = jax.random.normal(jax.random.key(1), (2, K))

    def layer(x, w):
        y = x @ w
        return jnp.concatenate([y, jnp.tanh(y), y[:, :16]], axis=1), y

    _, ys = jax.jit(lutjax.lift(lambda w, x: jax.lax.scan(layer, x, w)))(gated, x)
    dense = inner.materialize()
    for i, t in enumerate((0.0, 0.5, 1.0)):
        masked = jnp.where(jnp.abs(x) > t, x, 0.0)
        np.testing.assert_allclose(ys[i], masked @ dense[i], rtol=2e-3, atol=2e-3)
        x, _ = layer(masked, dense[i])
    mapped = jax.vmap(lambda w, x: w.matmul(x), in_axes=(0, None))(gated, x)
    assert mapped.shape == (3, 2, N)
    sliced = jax.tree.map(lambda a: a[1], gated)
    assert sliced.shape == (K, N) and float(sliced.threshold) == 0.5


def test_lift_runs_it_fused_and_does_not_recompile_for_a_new_threshold():
    count = 0

    def layer(params, x):
        nonlocal count
        count += 1
        return jax.nn.relu(x @ params["kernel"])

    step = jax.jit(lutjax.lift(layer, strict=True))
    x = jax.random.normal(jax.random.key(1), (1, K))
    for threshold in (0.2, 0.9):
        params = {"kernel": GatedArray.of(DenseArray.of(weight()), threshold)}
        expected = jax.nn.relu(jnp.where(jnp.abs(x) > threshold, x, 0.0) @ weight())
        np.testing.assert_allclose(step(params, x), expected, rtol=1e-5, atol=1e-5)
    assert count == 1
    assert "fused" in str(lutjax.lift.report(layer, params, x))


def test_views_and_slices():
    heads = jnp.reshape(weight(), (K, 4, 6))
    view = MatrixView.of(heads.shape, contract=(0,))
    gated = GatedArray.of(DenseArray.of(heads, 0, view), 0.5, jnp.ones(K))
    x = jax.random.normal(jax.random.key(1), (2, K))
    y = lutjax.lift(lambda w, x: jnp.einsum("mk,khd->mhd", x, w))(gated, x)
    masked = jnp.where(jnp.abs(x) > 0.5, x, 0.0)
    np.testing.assert_allclose(y, jnp.einsum("mk,khd->mhd", masked, heads), rtol=1e-4, atol=1e-5)
    flat = GatedArray.of(DenseArray.of(weight()), 0.5, jnp.ones(K))
    part = flat.slice_matrix("k", 8, 16)
    assert part.shape == (16, N) and part.row_norms.shape == (16,)
    np.testing.assert_allclose(
        part.matmul(x[:, 8:24]), masked[:, 8:24] @ weight()[8:24], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        flat.slice_matrix("n", 3, 5).matmul(x), (masked @ weight())[:, 3:8], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        flat.matmul_transposed(jnp.ones((1, N))), weight().sum(axis=1)[None], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("norms", [False, True])
def test_slices_at_a_traced_place(norms):
    gated = GatedArray.of(DenseArray.of(weight()), 0.5, jnp.ones(K) if norms else None)
    x = jax.random.normal(jax.random.key(1), (2, K))
    masked = jnp.where(jnp.abs(x) > 0.5, x, 0.0)

    @jax.jit
    @functools.partial(lutjax.lift, strict=True)
    def slices(w, x, start):
        columns = x @ jax.lax.dynamic_slice_in_dim(w, start, 5, 1)
        return columns, x[:, 3:19] @ jax.lax.dynamic_slice_in_dim(w, start, 16)

    columns, rows = slices(gated, x, jnp.int32(3))
    np.testing.assert_allclose(columns, masked @ weight()[:, 3:8], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows, masked[:, 3:19] @ weight()[3:19], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_row_layout_is_the_same_weight(bits):
    w = jax.random.normal(jax.random.key(0), (2, 40, 36))
    array = lutjax.quantize(w, bits=bits, group_size=32)
    for lanes in (None, 4):
        rows = RowLutArray.of(array, lanes)
        np.testing.assert_array_equal(rows.materialize(), array.materialize())
        x = jax.random.normal(jax.random.key(1), (2, 3, 40))
        np.testing.assert_allclose(rows.matmul(x), array.matmul(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_row_layout_is_never_held_dense(gate, transpose):
    k, n = 8192, 4096  # 32 tiles on a CPU
    rows = jax.eval_shape(
        lambda w: RowLutArray.of(lutjax.quantize(w, bits=4, group_size=32), 32),
        jax.ShapeDtypeStruct((k, n), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((32, n if transpose else k), jnp.float32)

    def loss(x, scales, w):
        w = dataclasses.replace(w, scales=scales)
        w = GatedArray.of(w, 0.5) if gate else w
        product = lutjax.lift(lambda w, x: x @ (w.T if transpose else w), strict=True)
        return jnp.sum(product(w, x) ** 2)

    for fn in (loss, jax.grad(loss), jax.grad(loss, argnums=1)):
        compiled = jax.jit(fn).lower(x, rows.scales, rows).compile()
        # A quarter of the float32 weight; a tile and what it is made of are less.
        assert compiled.memory_analysis().temp_size_in_bytes < k * n


def test_row_layout_of_dense_weights_runs_the_tpu_kernel():
    """On a TPU the kernel can copy single rows of this layout, and of no other dense one."""
    w = jax.random.normal(jax.random.key(0), (2, K, 256))
    gated = GatedArray.of(DenseArray.of(w, 1), np.array([0.3, 0.9]))
    rows = lutjax.prepack({"kernel": gated}, device_kind="TPU v6 lite")["kernel"]
    assert rows.base.blocks.shape == (2, K, 2, 128) and rows.shape == w.shape
    np.testing.assert_array_equal(rows.materialize(), w)
    x = jax.random.normal(jax.random.key(1), (2, 1, K))
    np.testing.assert_allclose(rows.matmul(x), gated.matmul(x), rtol=1e-5, atol=1e-5)
    y = jax.random.normal(jax.random.key(2), (2, 1, 256))
    np.testing.assert_allclose(
        rows.matmul_transposed(y), gated.matmul_transposed(y), rtol=1e-5, atol=1e-5
    )
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        kernels = [
            jax.jit(lambda w, x: w.matmul(x)).trace(jax.tree.map(lambda a: a[0], array), x[0])
            .lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
            for array in (gated, rows)
        ]  # fmt: skip
    assert kernels == [0, 1]
    assert part_specs(rows, P(None, "data", "model"), {"data": 2, "model": 2}).base.blocks == P(
        None, "data", "model", None
    )
    with pytest.raises(ValueError, match="2 blocks of columns do not split into 4"):
        part_specs(rows, P(None, None, "model"), {"model": 4})
    with pytest.raises(ValueError, match=r"N=24 of DenseArray.* no multiple of lanes=128"):
        RowDenseArray.of(DenseArray.of(weight()), 128)


@pytest.mark.parametrize("spec", [("model", None), (None, "model")])
def test_shardings(spec):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    gated = GatedArray.of(DenseArray.of(weight()), 0.5, jnp.ones(K))
    placed = jax.device_put(gated, lutjax.arrays.shardings_like(gated, sharding))
    assert placed.base.matrix.sharding.spec == sharding.spec
    x = jax.random.normal(jax.random.key(1), (1, K))
    np.testing.assert_allclose(
        jax.jit(lambda w, x: w.matmul(x))(placed, x), gated.matmul(x), rtol=1e-5, atol=1e-5
    )


def test_bad_input():
    inner = DenseArray.of(weight())
    with pytest.raises(ValueError, match="threshold=-1"):
        GatedArray.of(inner, -1.0)
    with pytest.raises(ValueError, match="threshold=nan"):
        GatedArray.of(inner, float("nan"))
    with pytest.raises(ValueError, match=r"threshold of shape \(2,\) does not fit"):
        GatedArray.of(inner, np.ones(2))
    with pytest.raises(ValueError, match=r"row_norms of shape \(3,\) must have shape \(64,\)"):
        GatedArray.of(inner, 1.0, jnp.ones(3))
    with pytest.raises(TypeError, match="gated already"):
        GatedArray.of(GatedArray.of(inner, 1.0), 1.0)
    pairs = lutjax.quantize(weight(), bits=4, group_size=32)
    pairs = jax.tree.map(lambda a: a, pairs)
    assert "GatedArray(shape=(64, 24), |x| > t" in repr(GatedArray.of(pairs, 1.0))
