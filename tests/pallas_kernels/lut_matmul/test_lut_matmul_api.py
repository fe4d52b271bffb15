"""``lut_matmul`` as a JAX function: transformations, gradients, dispatch and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lut_cases import Case, make, operands

from pallas_kernels.lut_matmul import IMPLEMENTATIONS, lut_matmul
from pallas_kernels.lut_matmul.reference import dequantize

KEYWORDS = {"k": 200, "group_size": 64}
CASE = Case(m=3, k=200, n=24, group_size=64, dtype="float32", offsets=True)


def dense(x, words, scales, lut, offsets, *, transpose=False):
    weight = dequantize(words, scales, lut, offsets, **KEYWORDS)
    return x @ (weight.T if transpose else weight)


@pytest.fixture(scope="module")
def args():
    return operands(make(CASE))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("tables,p", [("shared", 1), ("channel", 1), ("shared", 2), ("channel", 2)])
def test_gradients_match_the_dense_product(transpose, tables, p):
    case = Case(**{**vars(CASE), "tables": tables, "p": p, "transpose": transpose})
    x, words, scales, lut, offsets = operands(make(case))

    def loss(function):
        def f(x, scales, lut, offsets):
            return jnp.sum(jnp.sin(function(x, words, scales, lut, offsets)))

        return jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(x, scales, lut, offsets)

    fused = loss(lambda *a: lut_matmul(*a, **KEYWORDS, transpose=transpose))
    expected = loss(lambda *a: dense(*a, transpose=transpose))
    for a, b in zip(fused, expected, strict=True):
        # sin of sums of 200 products in float32: 1e-6 a product, amplified by the sum
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_weights_without_columns_give_empty_products_and_zeros(implementation):
    weight = jnp.zeros((8, 4, 0), jnp.uint8), jnp.ones((2, 0)), jnp.ones((1, 16, 1))
    options = {"k": 64, "group_size": 32, "implementation": implementation}
    assert lut_matmul(jnp.ones((2, 3, 64)), *weight, **options).shape == (2, 3, 0)
    y = lut_matmul(jnp.ones((2, 3, 0)), *weight, **options, transpose=True)
    np.testing.assert_array_equal(y, np.zeros((2, 3, 64)))


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_gradients_have_gradients(args, implementation):
    x, words, scales, *rest = args

    def penalty(function):
        def loss(x, scales):
            return jnp.sum(jnp.tanh(function(x, words, scales, *rest)))

        def squares(x, scales):
            found = jax.grad(loss, argnums=(0, 1))(x, scales)
            return sum(jnp.square(g).sum() for g in found)

        return jax.jit(jax.grad(squares, argnums=(0, 1)))(x, scales)

    fused = penalty(lambda *a: lut_matmul(*a, **KEYWORDS, implementation=implementation))
    for a, b in zip(fused, penalty(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))


def test_gradients_not_asked_for_are_not_computed(args):
    x, *weight = args

    def only_x(x):
        return jax.grad(
            lambda x: lut_matmul(x, *weight, **KEYWORDS, implementation="reference").sum()
        )(x)

    def also_scales(x, scales):
        def loss(x, scales):
            return lut_matmul(x, weight[0], scales, *weight[2:], **KEYWORDS).sum()

        return jax.grad(loss, argnums=(0, 1))(x, scales)

    without = jax.jit(only_x).trace(x).jaxpr
    with_scales = jax.jit(also_scales).trace(x, weight[1]).jaxpr
    contraction_over_m = "dimension_numbers=(([0], [0]), ([], []))"
    assert contraction_over_m not in str(without)
    assert contraction_over_m in str(with_scales)


def test_vmap_over_experts_and_over_activations(args):
    x, *weight = args
    stacked = tuple(
        jnp.stack([w, jnp.flip(w, -1)]) if i != 2 else jnp.stack([w, w * 2])
        for i, w in enumerate(weight)
    )
    f = lambda x, *w: lut_matmul(x, *w, **KEYWORDS)  # noqa: E731
    experts = jax.jit(jax.vmap(f, in_axes=(None, 0, 0, 0, 0)))(x, *stacked)
    for i in range(2):
        np.testing.assert_allclose(
            experts[i], dense(x, *(w[i] for w in stacked)), rtol=1e-4, atol=1e-3
        )
    xs = jnp.stack([x, -x])
    both = jax.vmap(f)(xs, *stacked)
    np.testing.assert_allclose(both[1], -experts[1], rtol=1e-5, atol=1e-5)
    only_x = jax.vmap(lambda x: f(x, *weight))(xs)
    # More rows at once may be another kernel: float32 sums of about 60 in another order.
    np.testing.assert_allclose(only_x[1], -f(x, *weight), rtol=1e-5, atol=1e-4)
    # a batch of activations is more rows of one product, not more products
    text = str(jax.make_jaxpr(jax.vmap(lambda x: f(x, *weight)))(xs))
    assert "f32[6,24]" in text


def test_scan_remat_and_leading_axes(args):
    x, *weight = args
    square = Case(m=3, k=24, n=24, group_size=8, dtype="float32")
    data = make(square)
    words, scales, lut = data["words"], data["scales"], data["lut"]
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), (words, scales, lut))

    def layer(x, w):
        return jnp.tanh(lut_matmul(x, *w, k=24, group_size=8)), None

    def loss(x, scales, layer):
        return jax.lax.scan(layer, x, (stack[0], scales, stack[2]))[0].sum()

    plain = jax.grad(loss, argnums=(0, 1))(data["x"], stack[1], layer)
    remat = jax.jit(jax.grad(lambda x, s: loss(x, s, jax.checkpoint(layer)), argnums=(0, 1)))(
        data["x"], stack[1]
    )
    for a, b in zip(plain, remat, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    y = lut_matmul(x.reshape(1, 3, 200), *weight, **KEYWORDS)
    assert y.shape == (1, 3, 24)
    assert lut_matmul(x[0], *weight, **KEYWORDS).shape == (24,)
    assert lut_matmul(x[:0], *weight, **KEYWORDS).shape == (0, 24)


def test_shard_map_splits_n_and_sums_the_gradient_of_the_table(args):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x, *weight = args
    P = jax.sharding.PartitionSpec
    specs = (P(), P(None, None, "model"), P(None, "model"), P(), P(None, "model"))
    f = jax.shard_map(
        lambda *a: lut_matmul(*a, **KEYWORDS), mesh=mesh, in_specs=specs, out_specs=P(None, "model")
    )
    np.testing.assert_allclose(jax.jit(f)(x, *weight), dense(x, *weight), rtol=1e-4, atol=1e-3)
    grads = jax.grad(lambda x, s, t: f(x, weight[0], s, t, weight[3]).sum(), argnums=(0, 1, 2))
    expected = jax.grad(
        lambda x, s, t: dense(x, weight[0], s, t, weight[3]).sum(), argnums=(0, 1, 2)
    )
    for a, b in zip(grads(x, *weight[1:3]), expected(x, *weight[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"words": lambda w: w.astype(jnp.int32)}, "words must be uint8"),
        ({"words": lambda w: w[:-1]}, r"\(24, 4, 24\).*needs 25"),
        ({"lut": lambda t: t[:, :8]}, r"\(1, 8, 1\) has 8 entries.*\(25, 4, 24\).*need 16"),
        ({"lut": lambda t: jnp.concatenate([t, t])}, "has 2 tables.*need 1 or N=24"),
        ({"lut": lambda t: t[0]}, r"lut must have shape \[T, 2\*\*bits, p\]"),
        ({"scales": lambda s: s[:-1]}, r"scales of shape \(3, 24\) must have shape \(4, 24\)"),
        ({"offsets": lambda s: s[:, :-1]}, r"offsets of shape \(4, 23\) must have shape \(4, 24\)"),
        ({"x": lambda x: x[:, :-1]}, r"x of shape \(3, 199\) must end in K=200"),
        ({"x": lambda x: x.astype(jnp.int32)}, "x must be floating point, got int32"),
        ({"words": lambda w: w[None]}, r"map over leading axes with jax.vmap"),
    ],
)
def test_bad_arguments(args, change, message):
    names = ("x", "words", "scales", "lut", "offsets")
    arrays = [change.get(n, lambda a: a)(a) for n, a in zip(names, args, strict=True)]
    with pytest.raises((ValueError, TypeError), match=message):
        lut_matmul(*arrays, **KEYWORDS)


def test_bad_options(args):
    with pytest.raises(ValueError, match="implementation='nope' is unknown"):
        lut_matmul(*args, **KEYWORDS, implementation="nope")
    with pytest.raises(ValueError, match="group_size=0"):
        lut_matmul(*args, k=200, group_size=0)
    for name in IMPLEMENTATIONS:
        try:
            lut_matmul(*args, **KEYWORDS, implementation=name)
        except NotImplementedError as error:
            assert name in str(error) and len(str(error)) > 40
