"""The compressed arrays against numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.adapters import AdapterArray
from lutjax.arrays import (
    ConcatArray,
    DenseArray,
    GatedArray,
    LowRankArray,
    LutArray,
    MatrixView,
    ProductArray,
    QuantizedScales,
    ReorderedArray,
    RotatedArray,
    RowDenseArray,
    RowLutArray,
    SumArray,
)
from lutjax.linear_maps import Projection
from lutjax.packing import pack
from lutjax.rotation import rotate_back

RNG = np.random.default_rng(0)
K, N, G = 40, 24, 16  # the last group has 8 rows


def make_lut(bits=4, tables=1, p=1, offsets=False, k=K, seed=0):
    """A weight and its dense matrix, computed from the formula in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (-(-k // p), N)).astype(np.uint8)
    lut = rng.normal(size=(tables, 2**bits, p)).astype(np.float32)
    scales = rng.uniform(0.5, 1, (-(-k // G), N)).astype(np.float32)
    shifts = rng.normal(size=scales.shape).astype(np.float32) if offsets else None
    rows, columns = np.arange(k)[:, None], np.arange(N)[None]
    table = columns if tables > 1 else 0
    dense = lut.astype(np.float64)[table, codes[rows // p, columns], rows % p]
    dense = dense * scales[rows // G, columns]
    if offsets:
        dense = dense + shifts[rows // G, columns]
    array = LutArray(
        words=pack(jnp.asarray(codes), bits),
        scales=jnp.asarray(scales),
        lut=jnp.asarray(lut),
        offsets=None if shifts is None else jnp.asarray(shifts),
        group_size=G,
        padding=-k % (8 * p),
        dtype=np.dtype(np.float32),
    )
    return array, dense


def make_coded():
    """With scales and offsets that are quantised themselves, two groups of a column a step."""
    rng = np.random.default_rng(4)
    array, _ = make_lut()
    unit, dense = jnp.ones_like(array.scales), []
    for zero in (20, 0):
        codes = rng.integers(0, 64, unit.shape).astype(np.uint8)
        steps = rng.uniform(0.5, 1, (2, N)).astype(np.float16)
        coded = QuantizedScales(
            pack(jnp.asarray(codes), 6), jnp.asarray(steps), None, 5, (2, 1), zero
        )
        values = (codes.astype(np.float64) - zero) * steps[np.arange(3) // 2]
        dense.append((coded, values[np.arange(K) // G]))
    (scales, scale), (offsets, offset) = dense
    values = dataclasses.replace(array, scales=unit).materialize()
    coded = dataclasses.replace(array, scales=scales, offsets=offsets)
    return coded, np.asarray(values, np.float64) * scale + offset


def make_low_rank():
    left, right = RNG.normal(size=(K, 3)), RNG.normal(size=(3, N))
    array = LowRankArray.of(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))
    return array, left @ right


def make_sum():
    (a, x), (b, y) = make_lut(), make_low_rank()
    return SumArray.of(a, b), x + y


def make_concat(axis):
    (a, x), (b, y) = make_lut(), make_lut(bits=3, seed=1)
    return ConcatArray.of(a, b, axis=axis), np.concatenate([x, y], axis="kn".index(axis))


def make_rotated():
    array, dense = make_lut(p=2)
    back = np.asarray(rotate_back(jnp.asarray(dense.T, jnp.float32), G), np.float64).T
    return RotatedArray.of(array, G), back


def make_reordered():
    array, stored = make_lut(offsets=True)
    order = np.random.default_rng(2).permutation(K)
    dense = np.empty_like(stored)
    dense[order] = stored
    return ReorderedArray.of(array, jnp.asarray(order)), dense


def make_product():
    (a, x), (b, y) = make_low_rank(), make_lut(k=N)
    return ProductArray.of(a, b), x @ y


def make_codes_by_rows():
    array, dense = make_lut(offsets=True)
    return RowLutArray.of(array), dense


def make_adapter():
    array, dense = make_lut()
    basis, latent = RNG.normal(size=(K, 3)), RNG.normal(size=(3, N))
    bound = Projection(jnp.asarray(basis, jnp.float32), "left")
    return AdapterArray.of(array, bound, jnp.asarray(latent, jnp.float32)), dense + basis @ latent


def make_dense():
    dense = np.random.default_rng(3).normal(size=(K, N))
    return DenseArray.of(jnp.asarray(dense, jnp.float32)), dense


def make_dense_by_rows():
    array, dense = make_dense()
    return RowDenseArray.of(array, lanes=8), dense


ARRAYS = {
    "4 bits": make_lut,
    "offsets": lambda: make_lut(bits=3, offsets=True),
    "table per column": lambda: make_lut(bits=2, tables=N),
    "vectors": lambda: make_lut(bits=4, p=2),
    "coded scales": make_coded,
    "low rank": make_low_rank,
    "sum": make_sum,
    "columns": lambda: make_concat("n"),
    "rows": lambda: make_concat("k"),
    "rotated": make_rotated,
    "reordered": make_reordered,
    "product": make_product,
    "dense": make_dense,
    "dense by rows": make_dense_by_rows,
    "codes by rows": make_codes_by_rows,
    "gate that is open": lambda: (GatedArray.of(make_lut()[0], 0.0), make_lut()[1]),
    "adapter": make_adapter,
}


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ARRAYS)
def test_against_the_formula(name):
    array, dense = ARRAYS[name]()
    k, n = dense.shape
    x = jnp.asarray(RNG.normal(size=(3, k)), jnp.float32)
    z = jnp.asarray(RNG.normal(size=(3, n)), jnp.float32)
    rows, columns = jnp.array([[0, 17], [k - 1, 8]]), jnp.array([3, n - 1])
    assert array.shape == (k, n) and array.ndim == 2 and array.size == k * n

    @jax.jit
    def everything(array, x, z):
        taken = (array.take(rows), array.T.take(columns))
        products = (array.matmul(x), array.matmul_transposed(z), x @ array, z @ array.T)
        return array.materialize(), *products, *taken

    out = everything(array, x, z)
    expected = (
        dense,
        x @ dense,
        z @ dense.T,
        x @ dense,
        z @ dense.T,
        dense[rows],
        dense.T[columns],
    )
    for a, e in zip(out, expected, strict=True):
        close(a, np.asarray(e, np.float64))


@pytest.mark.parametrize("name", ARRAYS)
def test_slices(name):
    array, dense = ARRAYS[name]()
    if name in ("adapter", "dense by rows", "codes by rows"):  # cannot be cut
        assert array.slice_matrix("n", 8, 8) is None and array.slice_matrix("k", 16, 16) is None
        return
    close(array.slice_matrix("n", 5, 7).materialize(), dense[:, 5:12])
    if name == "reordered":
        assert array.slice_matrix("k", 16, 16) is None
        return
    close(array.slice_matrix("k", 16, 16).materialize(), dense[16:32])
    close(array.slice_matrix("k", 16, dense.shape[0] - 16).materialize(), dense[16:])
    within_a_group = array.slice_matrix("k", 8, 8)
    if name in ("low rank", "product", "dense"):  # whose rows are in no groups
        close(within_a_group.materialize(), dense[8:16])
    else:
        assert within_a_group is None


@pytest.mark.parametrize("name", ARRAYS)
def test_transformations(name):
    array, dense = ARRAYS[name]()
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), array)
    x = jnp.asarray(RNG.normal(size=(3, dense.shape[0])), jnp.float32)
    assert stacked.shape == (2, *dense.shape) and stacked.batch_shape == (2,)

    @jax.jit
    def run(stacked, array, x):
        mapped = jax.vmap(lambda w: w.matmul(x))(stacked)
        scanned = jax.lax.scan(lambda c, w: (c, w.matmul(x)), 0, stacked)[1]
        gradient = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: array.matmul(x) ** 2)(x)))(x)
        return mapped, scanned, stacked.matmul(jnp.stack([x, x])), gradient

    y = np.asarray(x, np.float64) @ dense
    for product in run(stacked, array, x)[:3]:
        close(product, np.stack([y, y]))
    close(run(stacked, array, x)[3], 2 * y @ dense.T)
    shapes = jax.eval_shape(lambda a: a, array)
    assert shapes.shape == array.shape and shapes.nbytes == array.nbytes
    assert repr(shapes) == repr(array)


def test_bytes_and_bits_count_all_that_is_stored():
    array, _ = make_lut(bits=3, offsets=True)
    words, groups = 5 * 3 * N, 3 * N * 4
    assert array.nbytes == words + 2 * groups + 8 * 4
    assert array.bits_per_weight == 8 * array.nbytes / (K * N)
    low_rank, _ = make_low_rank()
    assert low_rank.nbytes == 4 * 3 * (K + N) and low_rank.rank == 3
    both = SumArray.of(array, low_rank)
    assert both.nbytes == array.nbytes + low_rank.nbytes


def test_repr_shows_what_matters_and_no_numbers():
    array, _ = make_lut(bits=3, offsets=True, tables=N)
    assert repr(array) == (
        "LutArray(shape=(40, 24), float32, 3 bits, group_size=16, offsets, a table per column, "
        "1.7 kB)"
    )
    column = dataclasses.replace(make_lut()[0], group_size=K)
    assert "group_size=column" in repr(column)
    low_rank, _ = make_low_rank()
    assert repr(low_rank) == "LowRankArray(shape=(40, 24), float32, rank=3, 768 B)"
    assert repr(RotatedArray.of(low_rank, 8)) == f"RotatedArray(block=8, {low_rank!r})"
    order = jnp.arange(K)
    assert repr(ReorderedArray.of(low_rank, order)) == f"ReorderedArray({low_rank!r})"
    assert repr(SumArray.of(low_rank)) == f"SumArray({low_rank!r})"
    assert repr(ConcatArray.of(low_rank, axis="n")) == f"ConcatArray({low_rank!r}, axis='n')"
    assert "None" in repr(jax.tree.map(lambda _: None, array))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_wider_result_is_not_rounded_to_the_activations(name):
    array, dense = ARRAYS[name]()
    x = jnp.asarray(RNG.normal(size=(64, dense.shape[0])), jnp.bfloat16)
    z = jnp.asarray(RNG.normal(size=(64, dense.shape[1])), jnp.bfloat16)
    for product, rows, matrix in (
        (array.matmul, x, dense),
        (array.matmul_transposed, z, dense.T),
    ):
        rounded, wide = product(rows), product(rows, out_dtype=jnp.float32)
        assert rounded.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
        expected = np.asarray(rows, np.float64) @ matrix
        for y in (rounded, wide):
            # What is in between may be in bfloat16: rotated or projected activations, weights.
            np.testing.assert_allclose(
                np.asarray(y, np.float64), expected, atol=2e-2 * np.abs(expected).max()
            )
        assert (wide != wide.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
        narrow = product(rows.astype(jnp.float32), out_dtype=jnp.bfloat16)
        assert narrow.dtype == jnp.bfloat16


def test_products_have_the_dtype_of_the_activations():
    array, dense = make_lut()
    for dtype, tolerance in ((jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)):
        x = jnp.asarray(RNG.normal(size=(3, K)), dtype)
        y = array.matmul(x)
        assert y.dtype == dtype
        expected = np.asarray(x, np.float64) @ dense
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, atol=tolerance * np.abs(expected).max()
        )
    assert array.astype(jnp.bfloat16).materialize().dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_terms_are_added_in_float32(dtype):
    # 1 + 1/4 of the spacing, eight times: lost when rounded after each term.
    eps = float(jnp.finfo(dtype).eps)
    terms = [1.0] + [eps / 4] * 8
    parts = [DenseArray.of(jnp.full((4, 1), v / 4, dtype)) for v in terms]
    x, expected = jnp.ones((1, 4), dtype), 1 + 2 * eps
    total = SumArray.of(*parts)
    assert float(total.matmul(x)[0, 0]) == expected
    assert float(total.matmul_transposed(x[:, :1])[0, 0]) == expected / 4
    assert float(total.materialize()[0, 0]) == expected / 4
    assert float(GatedArray.of(total, 0.5).matmul(x)[0, 0]) == expected
    rows = ConcatArray.of(*parts, axis="k")
    assert float(rows.matmul(jnp.ones((1, 4 * len(terms)), dtype))[0, 0]) == expected


def test_a_low_rank_product_may_leave_the_range_of_float16_inside():
    left, right = jnp.full((64, 2), 50, jnp.float16), jnp.full((2, 4), 1e-3, jnp.float16)
    w, x = LowRankArray.of(left, right), jnp.full((1, 64), 30, jnp.float16)
    np.testing.assert_allclose(w.matmul(x), 192, rtol=2e-3)  # 1e-3 in float16, and the result
    swapped = LowRankArray.of(right.T, left.T)
    np.testing.assert_allclose(swapped.matmul_transposed(x), 192, rtol=2e-3)


def test_parts_of_a_rotated_weight_are_rounded_like_the_whole():
    dense = jnp.asarray(RNG.normal(size=(K, N)), jnp.bfloat16)
    array = lutjax.quantize(dense, lutjax.Recipe.higgs(4, G))
    assert array.materialize().dtype == jnp.bfloat16
    np.testing.assert_array_equal(array.T.take(jnp.arange(N)), array.materialize().T)


def test_views_of_three_axes():
    array, dense = make_lut()
    heads = array.with_view(MatrixView.of((K, 4, 6), contract=(0,)))
    close(heads.materialize(), dense.reshape(K, 4, 6))
    close(heads.take(jnp.array([3])), dense.reshape(K, 4, 6)[[3]])
    assert heads.take_slices(jnp.array([3])) is not None
    assert heads.transpose((1, 0, 2)).take_slices(jnp.array([3])) is None  # a part of N
    close(
        heads.transpose((1, 0, 2)).take(jnp.array([3])),
        dense.reshape(K, 4, 6)[:, [3]].swapaxes(0, 1),
    )
    assert heads.outer_axis(1) == ("n", 6) and heads.outer_axis(2) is None
    assert heads.reshape((K, 24)).shape == (K, 24) and heads.reshape((4, 6, K)) is None
    assert heads.reshape((K, -1)).shape == (K, 24)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankArray.of(jnp.ones((4, 2)), jnp.ones((3, 4))), r"\(4, 2\).*\(3, 4\)"),
        (lambda: SumArray.of(make_lut()[0], make_lut(k=32)[0]), "cannot add"),
        (lambda: ReorderedArray.of(make_lut()[0], jnp.arange(3)), r"\(3,\); .* need \(40,\)"),
        (lambda: RotatedArray.of(make_lut()[0], 24), "block=24 must be a power of two"),
        (lambda: ConcatArray.of(make_lut()[0], make_lut(k=32)[0], axis="n"), "cannot concatenate"),
        (lambda: jnp.ones((1, K)) @ jax.tree.map(lambda a: a[None], make_lut()[0]), "a matrix"),
        (lambda: jax.tree.map(lambda a: a[None], make_lut()[0]).T, "leading batch axes"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_never_becomes_dense_by_itself():
    array, _ = make_lut()
    for convert in (np.asarray, jnp.asarray, jnp.exp, lambda w: jnp.ones((2, K)) + w):
        with pytest.raises(TypeError):
            convert(array)
    assert lutjax.is_compressed(array) and not lutjax.is_compressed(jnp.ones(2))
    with pytest.raises(TypeError, match="cannot stand for int8 numbers"):
        array.astype("int8")


def test_a_sharding_for_more_axes_than_there_are_is_refused():
    mesh = jax.make_mesh((1,), ("m",))
    by_a_third = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "m"))
    with pytest.raises(ValueError, match="the spec is for 3 axes, but the weight has 2"):
        lutjax.shardings_like(make_lut()[0], by_a_third)
