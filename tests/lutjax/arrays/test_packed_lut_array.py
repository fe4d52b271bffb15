"""Prepacked weights: the canonical ones in a kernel's layout, for inference only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax.arrays import GatedArray, LowRankArray, PackedLutArray, SumArray
from lutjax.arrays.sharding import part_specs
from pallas_kernels.lut_matmul import interpret_kernels


def weight(k=128, n=64, batch=(), dtype="bfloat16", **options):
    dense = jax.random.normal(jax.random.key(0), (*batch, k, n))
    quantize = lutjax.quantize
    for _ in batch:
        quantize = jax.vmap(quantize, in_axes=0)
    return lutjax.quantize(dense.astype(dtype), bits=4, group_size=32, **options)


def test_a_cpu_reads_canonical_words():
    params = {"a": weight(), "b": jnp.ones(3)}
    packed = lutjax.prepack(params)
    assert packed["a"] is params["a"] and packed["b"] is params["b"]


def test_quantised_scales_are_expanded_once_where_kernels_do_not_read_them():
    w = weight(double_quant=lutjax.DoubleQuant())
    gate = GatedArray.of(w, 1.0)
    on_a_cpu = lutjax.prepack({"a": w, "b": gate})
    assert on_a_cpu["a"].scales is w.scales and on_a_cpu["b"].base.scales is w.scales
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=108, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        packed = lutjax.prepack({"a": w, "b": gate})
    assert packed["a"].words is w.words
    for array in packed["a"], packed["b"].base:
        assert isinstance(array.scales, jax.Array) and array.scales.dtype == jnp.float32
        np.testing.assert_array_equal(array.materialize(), w.materialize())


def test_stacked_layers_run_under_lift_like_the_canonical_ones():
    w = weight()
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    stacked = dataclasses.replace(
        stacked, scales=stacked.scales * jnp.array([[[1]], [[2]]], stacked.scales.dtype)
    )
    x = jax.random.normal(jax.random.key(1), (3, 128), jnp.bfloat16)

    def model(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w) @ w.T, None

        return jax.lax.scan(layer, x, params["kernel"])[0]

    run = lutjax.lift(model, strict=True)
    expected = run({"kernel": stacked}, x)
    with interpret_kernels():
        packed = lutjax.prepack(
            {"kernel": stacked}, implementation="mosaic_tpu", device_kind="TPU v6 lite"
        )
        assert isinstance(packed["kernel"], PackedLutArray)
        assert packed["kernel"].shape == (2, 128, 64)
        y = run(packed, x)
        dense = packed["kernel"].materialize()
    # The entries of the table are rounded to bfloat16, by up to 2^-8, then the product is.
    exact = stacked.astype("float32").materialize()
    np.testing.assert_allclose(dense.astype("float32"), exact, rtol=1.01 * 2**-7)
    error = jnp.linalg.norm((y - expected).astype(float)) / jnp.linalg.norm(expected.astype(float))
    assert error < 2e-2  # two products in bfloat16 a layer, summed in another order


@pytest.mark.parametrize("codebook", ["nf", "affine"])  # affine tables have offsets
@pytest.mark.parametrize("implementation", ["mosaic_tpu", "mosaic_gpu", "xla"])
def test_sums_are_not_rounded_where_a_wider_result_is_wanted(implementation, codebook):
    """As the decoder wants its logits."""
    if implementation == "mosaic_gpu" and not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no interpret mode for Mosaic GPU")
    kind = "TPU v6 lite" if implementation == "mosaic_tpu" else None
    w = weight(codebook=codebook)
    x = jax.random.normal(jax.random.key(1), (3, 128), jnp.bfloat16)

    def logits(params, x):
        contract = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, params["head"], contract, preferred_element_type=jnp.float32)

    with interpret_kernels():
        packed = lutjax.prepack({"head": w}, implementation=implementation, device_kind=kind)
        run = lutjax.lift(logits, strict=True)
        y, rounded = run(packed, x), x @ packed["head"]
        nothing = LowRankArray.of(jnp.zeros((128, 2), w.dtype), jnp.zeros((2, 64), w.dtype))
        inside = run({"head": SumArray.of(packed["head"], nothing)}, x)
    np.testing.assert_array_equal(inside, y)
    assert y.dtype == jnp.float32 and rounded.dtype == jnp.bfloat16
    # A TPU computes equally spaced entries from integers; what kernels look up is in bfloat16.
    rounded_table = w.lut.astype(jnp.bfloat16).astype(jnp.float32)
    as_they_are = [("xla", "nf"), ("xla", "affine"), ("mosaic_tpu", "affine")]
    table = w.lut if (implementation, codebook) in as_they_are else rounded_table
    exact = dataclasses.replace(w, lut=table).astype("float32").materialize()
    expected = np.asarray(x, np.float64) @ np.asarray(exact, np.float64)

    def error(y):
        return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)

    assert error(y) < 1e-4 < 1e-3 < error(rounded)


def test_rows_are_taken_and_nested_weights_found():
    w = weight()
    low_rank = LowRankArray(
        jnp.ones((128, 2), jnp.bfloat16), jnp.ones((2, 64), jnp.bfloat16), w.dtype
    )
    gated = GatedArray.of(w, np.float32(0.5), None)
    params = {"sum": SumArray((w, low_rank)), "gated": gated}
    packed = lutjax.prepack(params, implementation="xla")
    assert isinstance(packed["sum"].parts[0], PackedLutArray)
    assert packed["gated"].base is w
    taken = packed["sum"].parts[0].take(jnp.array([5, 0]))
    np.testing.assert_array_equal(taken, w.materialize()[jnp.array([5, 0])])
    flipped = packed["sum"].parts[0].T.take(jnp.array([63]))
    np.testing.assert_array_equal(flipped, w.materialize().T[jnp.array([63])])


def test_rotated_weights_are_packed_inside():
    dense = jax.random.normal(jax.random.key(0), (128, 64), jnp.bfloat16)
    rotated = lutjax.quantize(dense, lutjax.Recipe.higgs(4, 64))
    packed = lutjax.prepack({"kernel": rotated}, implementation="xla")["kernel"]
    assert isinstance(packed.base, PackedLutArray)
    x = jax.random.normal(jax.random.key(1), (3, 128), jnp.bfloat16)
    # xla rounds the weight to bfloat16, and so does the packed matrix before it is rotated back
    for actual, expected in (
        (packed.matmul(x), rotated.matmul(x)),
        (packed.materialize(), rotated.materialize()),
    ):
        actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
        assert np.linalg.norm(actual - expected) < 6e-3 * np.linalg.norm(expected)


def test_what_it_cannot_do_is_refused(tmp_path):
    packed = lutjax.prepack({"kernel": weight()}, implementation="xla")
    with pytest.raises(TypeError, match="packed for activations of bfloat16, got float32"):
        jnp.ones((1, 128)) @ packed["kernel"]
    with pytest.raises(TypeError, match="packed for bfloat16, not float32"):
        packed["kernel"].astype("float32")
    with pytest.raises(TypeError, match="'kernel' is a PackedLutArray, which cannot be saved"):
        lutjax.save(tmp_path / "model", packed)
    assert not (tmp_path / "model").exists()
    odd = weight(k=96, dtype="float32")
    odd = dataclasses.replace(odd, group_size=48, scales=odd.scales[:2])
    with pytest.raises(ValueError, match=r"'a/kernel'.*group_size=48.*multiples of 32"):
        lutjax.prepack(
            {"a": {"kernel": odd}}, implementation="mosaic_tpu", device_kind="TPU v6 lite"
        )


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])
def test_an_embedding_is_looked_up_and_is_the_head(implementation):
    kind = "TPU v6 lite" if implementation == "mosaic_tpu" else None
    table = jax.random.normal(jax.random.key(0), (200, 128), jnp.bfloat16)
    params = lutjax.quantize({"embedding": table}, bits=4, group_size=32, embedding_bits=4)
    tokens = jnp.array([[3, 199], [0, 3]])

    def model(params, tokens):
        x = jnp.take(params["embedding"], tokens, axis=0)
        return x, x @ params["embedding"].T

    run = lutjax.lift(model, strict=True)
    with interpret_kernels():
        packed = lutjax.prepack(params, implementation=implementation, device_kind=kind)
        assert isinstance(packed["embedding"], PackedLutArray)
        x, logits = run(packed, tokens)
    np.testing.assert_array_equal(x, params["embedding"].materialize()[tokens])
    expected = np.asarray(run(params, tokens)[1], np.float64)
    error = np.linalg.norm(np.asarray(logits, np.float64) - expected)
    assert error < 1.1e-2 * np.linalg.norm(expected)  # sums and entries are rounded to bfloat16


def test_a_device_by_name():
    with pytest.raises(ValueError, match="'NVIDIA H200': only TPUs can be named"):
        lutjax.prepack({"kernel": weight()}, device_kind="NVIDIA H200")
    with interpret_kernels():
        packed = lutjax.prepack({"kernel": weight()}, device_kind="TPU v6 lite")["kernel"]
    assert packed.packed.implementation == "mosaic_tpu"


def test_a_packed_weight_is_not_split():
    packed = lutjax.prepack({"kernel": weight()}, implementation="xla")["kernel"]
    with pytest.raises(ValueError, match="packed for 1 x 1 shards of K and N, not 1 x 2"):
        part_specs(packed, P(None, "model"), {"model": 2})
    specs = part_specs(packed, P(), {"model": 2})
    shards = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    assert len(shards) == len(jax.tree.leaves(packed))
    assert all(set(spec) <= {None} for spec in shards)
