"""``ragged_dot``: rows that each meet one of several compressed weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lift_checks import assert_close, assert_lifted, normal, weight

import lutjax
from lutjax.lift import ragged

SIZES = {  # rows in x, rows of each group
    "fewer rows than groups": (3, [1, 0, 2, 0, 0]),
    "as many": (5, [0, 5, 0, 0, 0]),
    "a few tiles": (40, [0, 17, 3, 20, 0]),
    "one group has all": (40, [0, 0, 0, 0, 40]),
    "rows of no group": (40, [4, 0, 9, 1, 2]),
    "no rows of any group": (7, [0, 0, 0, 0, 0]),
    "no rows": (0, [0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", SIZES)
def test_ragged_dot(case):
    m, sizes = SIZES[case]
    experts = weight(5, 32, 24)

    def fn(w, x, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    assert_lifted(fn, experts, normal(m, 32), jnp.array(sizes))
    assert len(lutjax.lift.report(fn, experts, normal(m, 32), jnp.array(sizes)).fused) == 1


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32])
def test_sizes_of_any_integer_type(dtype):
    def fn(w, x, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    assert_lifted(fn, weight(3, 32, 24), normal(30, 32), jnp.array([20, 0, 9], dtype))


def test_more_rows_than_a_tile(monkeypatch):
    monkeypatch.setattr(ragged, "MAX_TILE", 8)
    assert_lifted(
        lambda w, x, sizes: jax.lax.ragged_dot(x, w, sizes),
        weight(2, 32, 24),
        normal(50, 32),
        jnp.array([33, 15]),
    )


@pytest.mark.parametrize(("m", "count"), [(1, 1), (4, 4), (9, 8), (4096, 128), (7, 300), (999, 2)])
def test_no_more_tiles_than_there_is_room_for(m, count):
    rows = ragged._tile_rows(m, count)
    tiles = (m + min(m, count) * (rows - 1)) // rows
    rng = np.random.default_rng(m)
    worst = np.zeros(count, int)
    groups = min(m, count)
    worst[:groups] = 1  # one row each, the rest in whole tiles and one row more
    worst[0] += m - groups
    for sizes in [worst, *(rng.multinomial(m, rng.dirichlet(np.full(count, a))) for a in (0.1, 9))]:
        assert (-(-sizes // rows)).sum() <= tiles


def test_transposed_weights_and_several_axes():
    numbers = jax.lax.RaggedDotDimensionNumbers
    x, sizes = normal(9, 32), jnp.array([2, 0, 7])

    def out_in(w, x):  # [expert, out, in]
        dims = numbers((((1,), (2,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x, w, sizes, dims)

    assert_lifted(out_in, weight(3, 24, 32, axis=2, batch_ndim=1), x)  # stored so
    assert_lifted(out_in, weight(3, 24, 32, axis=1, batch_ndim=1), x)  # the transposed product

    def several(w, x):  # [expert, heads, features, out]
        dims = numbers((((1, 2), (1, 2)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x, w, sizes, dims)

    assert_lifted(several, weight(3, 4, 8, 24, axis=(1, 2), batch_ndim=1), x.reshape(9, 4, 8))

    def kept(w, x):  # [expert, in, heads, features]
        dims = numbers((((1,), (1,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x, w, sizes, dims)

    assert_lifted(kept, weight(3, 32, 4, 8, axis=1, batch_ndim=1), x)


def test_what_it_cannot_do_is_dense_and_said():
    numbers = jax.lax.RaggedDotDimensionNumbers
    sizes = jnp.array([2, 7])

    def contracted(w, x):  # one product for each run of K
        dims = numbers((((1,), (0,)), ((), ())), [1], [])
        return jax.lax.ragged_dot_general(x, w, sizes, dims)

    use = lutjax.lift.report(contracted, weight(9, 24), normal(3, 9))
    assert [(u.outcome, u.primitive) for u in use.uses] == [("materialized", "ragged_dot_general")]


@pytest.mark.parametrize("kind", ["rotated", "prepacked", "sum", "gated"])
def test_every_kind_of_weight(kind):
    x, sizes = normal(40, 32), jnp.array([0, 17, 3, 15, 0])
    dense = normal(5, 32, 24)
    if kind == "rotated":
        experts = lutjax.quantize(dense, lutjax.Recipe.higgs(2, 16))
    elif kind == "prepacked":
        experts = lutjax.prepack(weight(5, 32, 24), implementation="xla")
    elif kind == "sum":
        low_rank = lutjax.LowRankArray.of(normal(5, 32, 3), normal(5, 3, 24, seed=2))
        experts = lutjax.SumArray.of(weight(5, 32, 24), low_rank)
    else:
        base = weight(5, 32, 24)
        thresholds = jnp.linspace(0.1, 1.0, 5)
        experts = lutjax.arrays.GatedArray(base, thresholds)
        lifted = lutjax.lift(jax.lax.ragged_dot, strict=True)(x, experts, sizes)
        ids = jnp.repeat(jnp.arange(5), sizes, total_repeat_length=40)
        kept = jnp.where(jnp.abs(x) > thresholds[ids][:, None], x, 0)
        expected = jax.lax.ragged_dot(kept, base.materialize(), sizes)
        assert_close(lifted, expected)
        return
    assert_lifted(lambda w, x: jax.lax.ragged_dot(x, w, sizes), experts, x)


@pytest.mark.parametrize("transpose", [False, True])
def test_dense_weights_take_the_same_tiles(transpose):
    """The values and gradients of XLA's own product, and vmap, which that does not have."""
    experts, x = normal(8, 64, 48), normal(512, 48 if transpose else 64, seed=2)
    sizes = jnp.array([100, 0, 12, 300, 0, 0, 50, 40])
    numbers = jax.lax.RaggedDotDimensionNumbers(
        (((1,), (2 if transpose else 1,)), ((), ())), [0], [0]
    )

    def fn(w, x):
        return jax.lax.ragged_dot_general(x, w, sizes, numbers)

    def loss(f):
        return lambda w, x: jnp.square(f(w, x)).sum()

    def compiled(f):
        return jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1))).lower(experts, x).compile()

    actual, expected = compiled(lutjax.lift(fn)), compiled(fn)
    assert_close(actual(experts, x), expected(experts, x))
    assert_close(jax.jit(lutjax.lift(fn))(experts, x), fn(experts, x))
    many = jax.jit(jax.vmap(lutjax.lift(fn), in_axes=(None, 0)))(experts, jnp.stack([x, 2 * x]))
    assert_close(many, jnp.stack([fn(experts, x), 2 * fn(experts, x)]))


def test_dense_weights_need_less_memory_in_tiles():
    shapes = (
        jax.ShapeDtypeStruct((2048, 256), jnp.float32),
        jax.ShapeDtypeStruct((32, 256, 128), jnp.float32),
        jax.ShapeDtypeStruct((32,), jnp.int32),
    )

    def temporaries(fn):
        return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(lutjax.lift(jax.lax.ragged_dot)) < temporaries(jax.lax.ragged_dot) / 4


def test_result_dtype():
    x, experts = normal(9, 32).astype(jnp.bfloat16), weight(3, 32, 24)
    sizes = jnp.array([2, 0, 7])

    def fn(w, x):
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)

    experts = experts.astype(jnp.bfloat16)
    actual = jax.jit(lutjax.lift(fn, strict=True))(experts, x)
    assert actual.dtype == jnp.float32
    # The dense bfloat16 weights are rounded once more, by up to 2**-9.
    expected = fn(experts.materialize(), x)
    np.testing.assert_allclose(actual, expected, atol=2e-2 * np.abs(actual).max())


def test_gradients_of_factors_and_scales():
    experts = lutjax.SumArray.of(
        weight(5, 32, 24), lutjax.LowRankArray.of(normal(5, 32, 3), normal(5, 3, 24, seed=2))
    )
    x, sizes = normal(40, 32), jnp.array([0, 17, 3, 20, 0])
    trainable, frozen = lutjax.partition(experts)

    def loss(trainable, apply):
        w = lutjax.combine(trainable, frozen)
        return jnp.square(apply(lambda w, x: jax.lax.ragged_dot(x, w, sizes))(w, x)).sum()

    def dense(fn):
        return lambda w, x: fn(w.materialize(), x)

    actual = jax.jit(jax.grad(lambda t: loss(t, lutjax.lift)))(trainable)
    expected = jax.jit(jax.grad(lambda t: loss(t, dense)))(trainable)
    assert jax.tree.leaves(actual)
    assert_close(actual, expected)


def test_stacked_layers_of_experts_and_vmap():
    layers = weight(2, 3, 32, 32, batch_ndim=2)
    sizes = jnp.array([2, 0, 7])

    def scanned(layers, x):
        return jax.lax.scan(lambda x, w: (jax.lax.ragged_dot(x, w, sizes), None), x, layers)[0]

    assert_lifted(scanned, layers, normal(9, 32))
    lifted = lutjax.lift(jax.lax.ragged_dot, strict=True)
    one = dataclasses.replace(
        layers, **{f: getattr(layers, f)[0] for f in ("words", "scales", "lut")}
    )
    x = normal(4, 9, 32)
    actual = jax.jit(jax.vmap(lifted, in_axes=(0, None, None)))(x, one, sizes)
    expected = jnp.stack([jax.lax.ragged_dot(each, one.materialize(), sizes) for each in x])
    assert_close(actual, expected)
