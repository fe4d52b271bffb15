"""The maps against dense matrices built from their formulas, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax import linear_maps as lm

MAPS = {
    "identity": lm.Identity(),
    "svd": lm.SVD(3),
    "svd_right": lm.SVD(3, side="right"),
    "randomized_svd": lm.RandomizedSVD(3),
    "gaussian": lm.Gaussian(3),
    "rademacher": lm.Rademacher(3, side="right"),
    "semi_orthogonal": lm.SemiOrthogonal(3),
    "kronecker": lm.Kronecker(lm.Gaussian(2, side="left"), lm.SVD(3, side="right")),
    "kronecker_identity": lm.Kronecker(lm.SVD(2, side="left"), lm.Identity()),
    "stacked": lm.Stacked(lm.SVD(2), lm.SemiOrthogonal(3)),
    "krona": lm.KronA((2, 4)),
    "principal": lm.PrincipalWeights(2, budget_rank=1),
}
SHAPES = [(6, 8), (2, 12, 8)]


def bound_map(map_, shape, dtype=jnp.float64, seed=0):
    """A refreshed map and the gradient and weight that it was refreshed from."""

    gradient, weight = np.random.default_rng(seed).normal(size=(2, *shape)).astype(dtype)

    @jax.jit
    def make(key, gradient, weight):
        bound = map_.init(key, shape, dtype=dtype)
        bound = map_.refresh(bound, jax.random.fold_in(key, 1), gradient=gradient, weight=weight)
        return bound

    return make(jax.random.key(seed), gradient, weight), jnp.asarray(gradient), jnp.asarray(weight)


down = jax.jit(lambda bound, gradient: bound.down(gradient))
up = jax.jit(lambda bound, latent: bound.up(latent))
basis_of = jax.jit(lambda bound: bound.basis)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_up_is_the_transpose_of_down(name, shape):
    with jax.enable_x64(True):
        bound, gradient, _ = bound_map(MAPS[name], shape)
        latent = down(bound, gradient)
        other = np.random.default_rng(7).normal(size=latent.shape)
        back = up(bound, other)
    # An identity in exact arithmetic; float64 sums of at most a few hundred terms.
    np.testing.assert_allclose(np.vdot(latent, other), np.vdot(gradient, back), rtol=1e-11)
    assert back.shape == shape


@pytest.mark.parametrize("name", MAPS)
def test_the_maps_gradient_is_the_gradient_of_the_adapter(name):
    shape = (6, 8)
    with jax.enable_x64(True):
        bound, _, weight = bound_map(MAPS[name], shape)
        target = jax.random.normal(jax.random.key(9), shape, jnp.float64)

        def loss(w):
            return jnp.sum(jnp.sin(w) * target)

        @jax.jit
        def both(bound):
            latent = 0.1 * bound.down(target)
            actual = jax.grad(lambda r: loss(bound.adapter(weight, r)))(latent)
            return actual, bound.down(jax.grad(loss)(bound.adapter(weight, latent)))

        actual, expected = both(bound)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MAPS)
def test_apply_is_the_product_with_the_matrix(name):
    with jax.enable_x64(True):
        bound, gradient, _ = bound_map(MAPS[name], (6, 8))
        x = jax.random.normal(jax.random.key(4), (2, 5, 6), jnp.float64)
        latent = down(bound, gradient)
        actual = jax.jit(lambda bound, latent: bound.apply(x, latent))(bound, latent)
        np.testing.assert_allclose(
            actual, np.asarray(x) @ np.asarray(up(bound, latent)), rtol=1e-11
        )


@pytest.mark.parametrize("shape", [(9, 6), (2, 6, 9)], ids=str)
@pytest.mark.parametrize("map_", [lm.SVD(3), lm.RandomizedSVD(3, power_iterations=3)], ids=repr)
def test_svd_keeps_the_top_singular_directions(map_, shape):
    with jax.enable_x64(True):
        bound, gradient, _ = bound_map(map_, shape)
        latent = down(bound, gradient)
        rank3 = up(bound, latent)
    assert latent.shape[-2:] == ((3, 9) if shape[-2] == 6 else (9, 3))
    u, s, vt = np.linalg.svd(np.asarray(gradient), full_matrices=False)
    best = (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]
    # With oversampling to full width both are exact; float64 decompositions of 6 x 9.
    np.testing.assert_allclose(rank3, best, atol=1e-10)
    basis = np.asarray(bound.basis)
    gram = np.swapaxes(basis, -1, -2) @ basis
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-12)


def test_randomized_svd_is_nearly_as_good_as_svd_on_a_decaying_spectrum():
    key = jax.random.key(0)
    u, _ = jnp.linalg.qr(jax.random.normal(key, (96, 96)))
    v, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (128, 96)))
    gradient = (u * (jnp.arange(1, 97, dtype=jnp.float32) ** -1.0)[None, :]) @ v.T
    kept = {}
    for map_ in (lm.SVD(16), lm.RandomizedSVD(16)):
        bound = map_.refresh(map_.init(key, gradient.shape), key, gradient=gradient)
        kept[type(map_)] = jnp.linalg.norm(bound.down(gradient))
    # Halko et al., theorem 10.6: with r + 8 columns and one power iteration a few per cent at most
    # of the tail; measured 0.03 %.
    assert kept[lm.RandomizedSVD] > 0.999 * kept[lm.SVD]


@pytest.mark.parametrize("d", [8, 37, 1000])
def test_semi_orthogonal_columns_are_orthonormal_also_across_workers(d):
    rank = max(1, d // 5)
    bound = lm.SemiOrthogonal(rank, side="left").init(jax.random.key(3), (d, d))
    basis = np.concatenate([np.asarray(basis_of(bound.for_worker(w))) for w in range(4)], axis=1)
    # float32 angles are reduced exactly, so only the rounding of cos and of the sum remains.
    np.testing.assert_allclose(basis.T @ basis, np.eye(4 * rank), atol=3e-6)


@pytest.mark.parametrize("map_", [lm.Gaussian(200), lm.Rademacher(200)], ids=repr)
def test_sketches_are_identity_in_expectation(map_):
    basis = map_.init(jax.random.key(1), (200, 201)).basis
    gram = np.asarray(basis @ basis.T)
    # Off-diagonal entries have standard deviation 1/sqrt(r) = 0.07, diagonal ones at most 0.1.
    assert abs(np.diag(gram).mean() - 1) < 0.03
    assert abs((gram - np.diag(np.diag(gram))).mean()) < 0.01
    assert 0.04 < (gram - np.diag(np.diag(gram))).std() < 0.1


@pytest.mark.parametrize("map_", [lm.Gaussian(4), lm.Rademacher(4), lm.SemiOrthogonal(4)], ids=repr)
def test_sketches_are_regenerated_not_stored(map_):
    shape = (3, 64, 64)
    bound = map_.init(jax.random.key(0), shape)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(bound))
    assert stored == 3 * (8 + 4)  # a key and a worker index for each matrix
    np.testing.assert_array_equal(bound.basis, bound.basis)
    assert not np.array_equal(bound.basis[0], bound.basis[1])
    again = map_.refresh(bound, jax.random.key(1))
    assert not np.allclose(again.basis, bound.basis)
    # Slicing the stacked axis slices the map: scan over layers sees each layer's own map.
    layer = jax.tree.map(lambda x: x[1], bound)
    # One matrix may be compiled to other float32 roundings than a batch of them.
    np.testing.assert_allclose(layer.basis, bound.basis[1], rtol=1e-6)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("map_", [lm.Gaussian(2), lm.Rademacher(2), lm.SemiOrthogonal(2)], ids=repr)
def test_a_slice_of_a_stack_has_the_factor_that_the_stack_has(map_, impl):
    bound = map_.init(jax.random.key(0, impl=impl), (3, 6, 8))
    for other in (bound, map_.refresh(bound, jax.random.key(1, impl=impl))):
        alone = [jax.tree.map(lambda a, i=i: a[i], other).basis for i in range(3)]
        np.testing.assert_array_equal(other.basis, np.stack(alone))
        assert not np.array_equal(alone[0], alone[1])


def test_kronecker_is_left_times_gradient_times_right():
    with jax.enable_x64(True):
        bound, gradient, _ = bound_map(MAPS["kronecker"], (6, 8))
        left, right = bound.left.basis.T, bound.right.basis
        expected = left @ gradient @ right

        def vec(a):
            return np.asarray(a).reshape(-1, order="F")

        dense = np.kron(np.asarray(right).T, np.asarray(left)) @ vec(gradient)
        np.testing.assert_allclose(bound.down(gradient), expected, rtol=1e-12)
        np.testing.assert_allclose(vec(bound.down(gradient)), dense, rtol=1e-12)


def test_krona_is_numpys_kron():
    with jax.enable_x64(True):
        bound, gradient, _ = bound_map(lm.KronA((2, 4)), (6, 8))
        latent = bound.down(gradient)
        np.testing.assert_allclose(
            bound.up(latent), np.kron(np.asarray(bound.factor), np.asarray(latent)), rtol=1e-13
        )


def test_principal_weights_are_the_largest_of_the_reduced_matrix():
    with jax.enable_x64(True):
        bound, _, weight = bound_map(lm.PrincipalWeights(2, budget_rank=1), (6, 8))
    u, s, vt = np.linalg.svd(np.asarray(weight))
    reduced = np.abs((u[:, :2] * s[:2]) @ vt[:2]).ravel()
    expected = np.sort(np.argsort(reduced)[::-1][: 6 + 8])
    np.testing.assert_array_equal(bound.indices, expected)


@pytest.mark.parametrize(
    ("shape", "numbers", "matrix"),
    [
        ((4, 3, 5), lm.DimensionNumbers(0, (1, 2)), (4, 15)),
        ((3, 5, 4), lm.DimensionNumbers((0, 1), 2), (15, 4)),
        ((7, 4, 3, 5), lm.DimensionNumbers(1, (2, 3)), (7, 4, 15)),
        ((5, 4), lm.DimensionNumbers(1, 0), (4, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("map_", [lm.SVD(2), lm.Gaussian(2)], ids=repr)
def test_nd_weights_are_matrices_by_dimension_numbers(map_, shape, numbers, matrix):
    key = jax.random.key(0)
    gradient = jax.random.normal(key, shape)

    @jax.jit
    def latent_and_back(gradient):
        bound = map_.init(key, gradient.shape, dimension_numbers=numbers)
        bound = map_.refresh(bound, key, gradient=gradient)
        return bound.down(gradient), bound.up(bound.down(gradient))

    latent, back = latent_and_back(gradient)
    axes = (numbers.reduction_axis, numbers.output_axis)
    axes = [a if isinstance(a, tuple) else (a,) for a in axes]
    batch = [a for a in range(len(shape)) if a not in axes[0] + axes[1]]
    flat = np.asarray(gradient).transpose(*batch, *axes[0], *axes[1]).reshape(matrix)
    plain = jax.jit(lambda g: map_.refresh(map_.init(key, matrix), key, gradient=g).down(g))(flat)
    np.testing.assert_allclose(latent, plain, rtol=1e-5, atol=1e-6)
    assert back.shape == shape


@pytest.mark.parametrize("name", ["svd", "gaussian", "kronecker", "stacked", "krona"])
def test_carry_rotates_a_first_moment_into_the_new_basis(name):
    map_ = MAPS[name]
    with jax.enable_x64(True):
        old, gradient, _ = bound_map(map_, (6, 8), seed=0)
        new, _, _ = bound_map(map_, (6, 8), seed=5)
        moment = down(old, gradient)
        carried = jax.jit(lambda new, old, moment: new.carry(old, moment, 1))(new, old, moment)
        np.testing.assert_allclose(carried, down(new, up(old, moment)), rtol=1e-11)
        np.testing.assert_array_equal(new.carry(old, moment, 2), moment)


def test_carry_keeps_the_moments_of_entries_that_stay_selected():
    map_ = lm.PrincipalWeights(2, budget_rank=1)
    old, gradient, _ = bound_map(map_, (6, 8), jnp.float32, seed=0)
    new, _, _ = bound_map(map_, (6, 8), jnp.float32, seed=5)
    moment = jnp.arange(1.0, 15.0)
    expected = [
        float(moment[list(old.indices).index(i)]) if i in np.asarray(old.indices) else 0.0
        for i in np.asarray(new.indices)
    ]
    for order in (1, 2):
        np.testing.assert_array_equal(new.carry(old, moment, order), expected)
    del gradient


@pytest.mark.parametrize("map_", [lm.SVD(3), lm.Gaussian(3), lm.SemiOrthogonal(3)], ids=repr)
def test_maps_work_under_jit_vmap_and_bfloat16(map_):
    gradient = jax.random.normal(jax.random.key(0), (4, 6, 8), jnp.bfloat16)
    bound = map_.init(jax.random.key(1), (6, 8), dtype=jnp.bfloat16)

    @jax.jit
    @jax.vmap
    def round_trip(g):
        refreshed = map_.refresh(bound, jax.random.key(2), gradient=g)
        return refreshed.down(g), refreshed.up(refreshed.down(g))

    latent, back = round_trip(gradient)
    chex.assert_shape(latent, (4, 3, 8))
    chex.assert_shape(back, (4, 6, 8))
    assert latent.dtype == back.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.SVD(7).init(jax.random.key(0), (6, 8)), "rank=7 of SVD.*min.m, n.=6"),
        (lambda: lm.Gaussian(0).init(jax.random.key(0), (6, 8)), "rank=0 of Gaussian"),
        (lambda: lm.SVD(2, side="top").init(jax.random.key(0), (6, 8)), "side='top'"),
        (lambda: lm.Kronecker(lm.SVD(2), lm.SVD(2, side="right")), "must say side='left'"),
        (lambda: lm.Stacked(lm.SVD(2, side="left"), lm.SVD(2, side="right")), "same side"),
        (lambda: lm.Stacked(lm.Identity()), "one-sided"),
        (lambda: lm.KronA((4, 4)).init(jax.random.key(0), (6, 8)), r"factor=\(4, 4\)"),
        (
            lambda: lm.SVD(2).init(
                jax.random.key(0), (6, 8), dimension_numbers=lm.DimensionNumbers(0, 0)
            ),
            "disjoint",
        ),
        (
            lambda: lm.SVD(2).init(
                jax.random.key(0), (2, 6, 8), dimension_numbers=lm.DimensionNumbers(0, 1)
            ),
            "batch axes must come first",
        ),
        (
            lambda: lm.SVD(2).refresh(lm.SVD(2).init(jax.random.key(0), (6, 8)), jax.random.key(0)),
            "pass gradient=",
        ),
        (
            lambda: lm.resolve_dimension_numbers(
                {"w": jnp.ones((2, 3))}, {"w": lm.DimensionNumbers(0, 2)}
            ),
            "does not fit 'w'.*axis 2 is out of range",
        ),
        (
            lambda: lm.resolve_dimension_numbers(
                {"w": jnp.ones((2, 3))}, {"v": lm.DimensionNumbers()}
            ),
            "names 'v', which is not a parameter",
        ),
        (lambda: lm.matching("x/*")({"w": jnp.ones((2, 3))}), "no parameter matches"),
        (lambda: lm.matching("w", "x/*")({"w": jnp.ones((2, 3))}), "no parameter matches 'x/"),
        (lambda: lm.matching("*", "w")(jnp.int32(1)), r"matching\('\*', 'w'\) was called on a num"),
    ],
)
def test_bad_input_names_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_may_be_one_bare_array():
    weight = jnp.ones((6, 8))
    found = lm.resolve_dimension_numbers(weight, lm.matching("*"))
    assert found == {"": lm.DimensionNumbers()}
    with pytest.raises(ValueError, match=r"no parameter matches 'w'; the paths are \[''\]$"):
        lm.matching("w")(weight)
