"""Products and lookups on the compressed form, in strict mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lift_checks import assert_close, assert_lifted, normal, weight

import lutjax
from lutjax.arrays import DenseArray, LowRankArray, ProductArray

EINSUMS = [  # subscripts with the weight second, its shape, its contraction axes, batch axes
    ("bk,kn->bn", (32, 24), 0, 0),
    ("abk,kn->abn", (32, 24), 0, 0),
    ("k,kn->n", (32, 24), 0, 0),
    ("bk,kn->nb", (32, 24), 0, 0),
    ("bn,kn->bk", (32, 24), 0, 0),  # the transposed product of a tied head
    ("bk,nk->bn", (24, 32), 1, 0),  # Equinox: [out, in]
    ("btd,dhe->bthe", (32, 3, 8), 0, 0),  # DenseGeneral to heads
    ("bthe,hed->btd", (3, 16, 24), (0, 1), 0),  # and back from them
    ("bteh,hed->btd", (3, 16, 24), (0, 1), 0),  # in another order
    ("bthe,dhe->btd", (24, 3, 16), (1, 2), 0),
    ("ebk,ekn->ebn", (3, 32, 24), 1, 1),  # experts
    ("bek,ekn->ben", (3, 32, 24), 1, 1),
    ("bk,ekn->ebn", (3, 32, 24), 1, 1),  # every expert sees the same input
    ("bek,ekn->bn", (3, 32, 24), 1, 1),  # summed over experts
    ("ebn,ekn->ebk", (3, 32, 24), 1, 1),
    ("lebk,lekn->lebn", (2, 3, 32, 24), 2, 2),
    ("lbk,lekn->lebn", (2, 3, 32, 24), 2, 2),
    ("ebk,lekn->lebn", (2, 3, 32, 24), 2, 2),
    ("ebthf,ehfd->ebtd", (2, 3, 16, 8), (1, 2), 1),
    ("ebtd,edhf->ebthf", (2, 32, 3, 8), (1,), 1),
]


@pytest.mark.parametrize(
    ("subscripts", "shape", "axis", "batch_ndim"), EINSUMS, ids=lambda v: str(v)
)
def test_einsum(subscripts, shape, axis, batch_ndim):
    w = weight(*shape, axis=axis, batch_ndim=batch_ndim)
    inputs, out = subscripts.split("->")
    x_axes, w_axes = inputs.split(",")
    sizes = dict(zip(w_axes, shape, strict=True))
    x = normal(*[sizes.get(a, 2) for a in x_axes])

    def either_order(w, x):
        y = jnp.einsum(f"{x_axes},{w_axes}->{out}", x, w)
        return y, jnp.einsum(f"{w_axes},{x_axes}->{out}", w, x)

    assert_lifted(either_order, w, x)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_bits(bits):
    w = weight(40, 24, bits=bits, group_size=32)  # a shorter last group
    assert_lifted(lambda w, x: (x @ w) @ w.T, w, normal(3, 40))


def test_result_dtype_is_that_of_dot_general():
    w = weight(32, 24).astype(jnp.bfloat16)
    x = normal(2, 32).astype(jnp.bfloat16)

    def fn(w, x):
        contract = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)

    actual = jax.jit(lutjax.lift(fn, strict=True))(w, x)
    assert actual.dtype == jnp.float32
    # The dense bfloat16 weight is rounded once more, by up to 2**-9.
    np.testing.assert_allclose(actual, fn(w.materialize(), x), atol=2e-2 * np.abs(actual).max())
    assert jax.jit(lutjax.lift(jnp.matmul, strict=True))(x, w).dtype == jnp.bfloat16


@pytest.mark.parametrize("rotated", [False, True])
def test_prepacked_weights_take_their_own_dtype(rotated):
    w = jnp.asarray(normal(32, 24), jnp.bfloat16)
    w = (
        lutjax.quantize(w, lutjax.Recipe.higgs(4, 16))
        if rotated
        else lutjax.quantize(w, bits=4, group_size=16)
    )
    x = normal(2, 32).astype(jnp.bfloat16)

    def fn(w, x):
        contract = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)

    lifted = jax.jit(lutjax.lift(fn, strict=True))
    expected = lifted(w, x)
    actual = lifted(lutjax.prepack(w, implementation="xla"), x)
    assert actual.dtype == jnp.float32
    # The kernel's result is rounded to bfloat16, by up to 2**-9; so are rotated activations.
    np.testing.assert_allclose(actual, expected, atol=2**-7 * np.abs(expected).max())


def test_float64_is_not_pretended():
    with jax.enable_x64(True):
        w = weight(32, 24)

        def fn(w, x):
            return x @ w.astype(jnp.float64)

        use = lutjax.lift.report(fn, w, normal(2, 32).astype(jnp.float64))
        assert [u.outcome for u in use.uses] == ["materialized"]


def test_empty_batch():
    assert_lifted(lambda w, x: x @ w, weight(32, 24), jnp.zeros((0, 32)))


TOKENS = jnp.array([[0, 5, 31], [2, 40, 7]])


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
@pytest.mark.parametrize("axis", [0, 1])
def test_take(mode, axis):
    def fn(w, i):
        return jnp.take(w, i, axis=axis, mode=mode)

    assert_lifted(fn, weight(40, 48), TOKENS)  # 40 is out of range along axis 0
    assert_lifted(fn, weight(40, 48, axis=1), TOKENS)


def test_indexing():
    w = weight(40, 48)
    assert_lifted(lambda w, i: (w[i], w[i[0]], w[:, i], w[3], w[-1], w[5][:2]), w, TOKENS - 3)
    assert_lifted(lambda w, i: w.at[i].get(mode="fill", fill_value=7.0), w, TOKENS)
    assert_lifted(lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1), w, jnp.int32(100))
    assert_lifted(lambda w, i: jax.vmap(lambda j: w[j])(i), w, jnp.array([1, 2]))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int16])
def test_narrow_indices(dtype):
    table, kernel = weight(300, 32, axis=-1), weight(32, 8, 64, axis=0)
    assert_lifted(
        lambda w, i: jnp.take(w, i, axis=0, mode="clip"), table, jnp.array([1, 120], dtype)
    )
    assert_lifted(lambda w, i: jax.lax.dynamic_slice_in_dim(w, i, 1), table, jnp.array(100, dtype))
    assert_lifted(
        lambda w, i, x: jnp.einsum("bk,khd->bhd", x, jax.lax.dynamic_slice_in_dim(w, i, 2, 1)),
        kernel,
        jnp.array(5, dtype),
        normal(2, 32),
    )


@pytest.mark.parametrize("axis", [(1,), (0,)])
def test_lookup_in_a_table_with_several_axes(axis):
    table = weight(24, 32, 1, axis=axis)
    assert_lifted(lambda w, i: w[i], table, jnp.array([0, 7]))


def test_lookup_in_stacked_tables():
    tables = weight(3, 24, 32)
    ids = jnp.array([[0, 1], [5, 23], [9, 9]])
    assert_lifted(lambda w, i: jax.vmap(lambda w, i: w[i])(w, i), tables, ids)
    assert_lifted(lambda w, i: jax.vmap(lambda w, i: w[:, i])(w, i), tables, ids)


def test_tied_head():
    table = weight(50, 32, axis=-1)

    def fn(table, ids, x):
        return (table[ids] + x) @ table.T

    assert_lifted(fn, table, jnp.array([1, 49]), normal(2, 32))
    assert len(lutjax.lift.report(fn, table, jnp.array([1]), normal(1, 32)).fused) == 2


def test_choosing_an_expert_keeps_it_compressed():
    experts = weight(4, 32, 24)

    def one(w, x, i):
        return x @ w[i]

    def several(w, x, i):
        return jnp.einsum("tk,tkn->tn", x, w[i])

    assert_lifted(one, experts, normal(2, 32), jnp.int32(2))
    assert_lifted(several, experts, normal(3, 32), jnp.array([3, 0, 3]))


def test_random_functions_of_a_low_rank_and_a_sum_array():
    low_rank = lutjax.LowRankArray.of(normal(32, 3), normal(3, 24, seed=2))
    params = {"w": weight(32, 24), "a": low_rank}

    def fn(p, x, i):
        w = p["w"] + p["a"]
        return x @ w, (x @ w) @ w.T, w[i], w[:, 8:16], p["a"][i]

    assert_lifted(fn, params, normal(2, 32), jnp.array([3, 31]))


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
    ],
)
def test_the_result_has_the_dtype_that_jax_gives_it(x_dtype, w_dtype):
    """Under strict promotion, too, which knows nothing of ``lax.dot_general``."""
    w, x = weight(32, 24).astype(w_dtype), normal(3, 32).astype(x_dtype)

    def product(w, x):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))

    y, expected = lutjax.lift(product, strict=True)(w, x), product(w.materialize(), x)
    assert y.dtype == expected.dtype
    error = np.linalg.norm(np.asarray(y, np.float64) - np.asarray(expected, np.float64))
    assert error < 1e-2 * np.linalg.norm(np.asarray(expected, np.float64))


def test_low_rank_weights_of_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        left, right = rng.normal(size=(32, 4)), rng.normal(size=(4, 24))
        low_rank = LowRankArray.of(jnp.asarray(left), jnp.asarray(right))
        factors = ProductArray.of(
            DenseArray.of(jnp.asarray(left)), DenseArray.of(jnp.asarray(right))
        )
        with pytest.warns(lutjax.MaterializationWarning):  # kernels sum in float32
            y = lutjax.lift(jnp.matmul)(jnp.eye(32), low_rank)
        np.testing.assert_allclose(y, left @ right, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(factors.materialize(), left @ right, rtol=1e-13, atol=1e-13)


def test_one_of_a_second_stacked_axis_stays_compressed():
    stack, x = weight(3, 2, 32, 24, batch_ndim=2), normal(3, 5, 32)

    def run(stack, x, i):
        return jnp.einsum("ebk,ekn->ebn", x, stack[:, i])

    i = jnp.int32(1)
    y = lutjax.lift(run, strict=True)(stack, x, i)
    assert_close(y, run(stack.materialize(), x, i))


def test_lookups_under_debug_nans():
    w, i = weight(32, 24), jnp.array([1, 5])
    with jax.debug_nans(True):
        rows = lutjax.lift(lambda w, i: jnp.take(w, i, axis=0), strict=True)(w, i)
    np.testing.assert_array_equal(rows, w.materialize()[i])
