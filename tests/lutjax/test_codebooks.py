import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from lutjax import codebooks

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def relative_mse(table, scale_size=64):
    """Mean squared error of an absmax-scaled Gaussian over its mean square, in float64."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((20_000, scale_size))
    scale = np.abs(w).max(axis=1, keepdims=True)
    table = np.sort(np.asarray(table, np.float64))
    index = np.searchsorted((table[1:] + table[:-1]) / 2, w / scale)
    return np.square(table[index] * scale - w).mean() / np.square(w).mean()


def test_nf4_is_the_published_table():
    np.testing.assert_allclose(codebooks.normal_float(4), NF4, atol=3e-7)  # float32 rounding
    np.testing.assert_allclose(codebooks.normal_float_flute(4), NF4, atol=3e-7)


def test_nf_variants_at_two_and_three_bits():
    np.testing.assert_allclose(codebooks.normal_float_flute(2), [-1, 0, 0.337915, 1], atol=1e-6)
    flute3 = [-1, -0.478629, -0.217142, 0, 0.160930, 0.337915, 0.562617, 1]
    np.testing.assert_allclose(codebooks.normal_float_flute(3), flute3, atol=1e-6)
    own3 = [-1, -0.535023, -0.246931, 0, 0.183337, 0.381994, 0.622986, 1]
    np.testing.assert_allclose(codebooks.normal_float(3), own3, atol=1e-6)


# Published relative errors of the FLUTE tables on N(0, 1) with groups of 64.
@pytest.mark.parametrize(("bits", "error"), [(2, 0.316), (3, 0.0406), (4, 0.00846)])
def test_nf_error_on_gaussian_weights(bits, error):
    assert relative_mse(codebooks.normal_float_flute(bits)) == pytest.approx(error, rel=0.01)


def test_default_nf3_is_better_than_the_flute_table():
    own, flute = codebooks.normal_float(3), codebooks.normal_float_flute(3)
    assert relative_mse(own) < 0.97 * relative_mse(flute)


@pytest.mark.parametrize("name", sorted(codebooks.CODEBOOKS))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_table_has_its_size_or_says_why_not(name, bits):
    try:
        table = codebooks.codebook(name, bits)
    except ValueError as error:
        assert f"{bits}" in str(error) and "bits" in str(error)
        return
    assert table.shape == (2**bits,) and table.dtype == np.float32
    assert table.max() == 1.0
    assert codebooks.is_affine(table) == (name == "affine")


@pytest.mark.parametrize("values", [[1, 2, 3], [[1, 2]], [0, 0], [np.nan, 1], list(range(512))])
def test_user_table_rejects(values):
    with pytest.raises(ValueError, match="codebook"):
        codebooks.user_table(values)


def test_unknown_codebook_lists_the_known():
    with pytest.raises(ValueError, match=r"'nf5'.*affine.*kmeans.*nf"):
        codebooks.codebook("nf5", 4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_nearest_codes_against_brute_force(bits, seed):
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.linspace(-1, 1, 2**bits) + rng.uniform(0, 0.1 / 2**bits, 2**bits))
    table = table.astype(np.float32)
    values = rng.uniform(-1.2, 1.2, (17, 5)).astype(np.float32)
    codes = np.asarray(codebooks.nearest_codes(jnp.asarray(values), table))
    distance = np.abs(values[..., None].astype(np.float64) - table)
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
    # float32 midpoints may decide ties within one rounding of the values
    np.testing.assert_allclose(chosen, distance.min(-1), atol=1e-7)


@pytest.mark.parametrize("bits", [4, 6])
def test_nearest_codes_with_a_table_per_column(bits):
    rng = np.random.default_rng(0)
    tables = np.sort(rng.uniform(-1, 1, (2, 5, 2**bits)).astype(np.float32))
    values = rng.uniform(-1, 1, (2, 9, 5)).astype(np.float32)
    codes = np.asarray(codebooks.nearest_codes(jnp.asarray(values), jnp.asarray(tables)))
    expected = np.abs(values[..., None] - tables[:, None]).argmin(-1)
    np.testing.assert_array_equal(codes, expected)


def test_ties_go_to_the_lower_value():
    values = jnp.array([[-0.5], [0.5]])
    assert codebooks.nearest_codes(values, np.float32([-1, 0, 1, 2])).ravel().tolist() == [0, 1]


def test_kmeans_beats_the_table_it_starts_from_and_respects_weights():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.beta(0.5, 0.5, (512, 4)) * 2 - 1, jnp.float32)

    def error(table, weight=1.0):
        distance = np.square(np.asarray(values)[..., None] - np.asarray(table)).min(-1)
        return (distance * weight).mean()

    shared = codebooks.kmeans(values, 3)
    each = codebooks.kmeans(values, 3, per_channel=True)
    assert shared.shape == (1, 8) and each.shape == (4, 8)
    # Evenly spaced values would gain 31 % on this arcsine law; Lloyd's local optima more.
    for table in (shared[:, None], each[None]):
        assert error(table) < 0.6 * error(codebooks.normal_float(3))
    weights = jnp.asarray(rng.uniform(size=values.shape) > 0.9, jnp.float32) + 1e-3
    weighted = codebooks.kmeans(values, 3, weights=weights)
    assert error(weighted[:, None], weights) < error(shared[:, None], weights)


# Errors that HIGGS (arXiv 2411.17525) builds on: of the best points on the line, and about those of
# the plane.
@pytest.mark.parametrize(
    ("bits", "vector_size", "error"),
    [
        (2, 1, 0.11748),
        (3, 1, 0.034548),
        (4, 1, 0.009501),
        (4, 2, 0.1076),
        (6, 2, 0.02962),
        (8, 2, 0.00777),  # HIGGS: 0.0079
    ],
)
def test_gaussian_error_on_normal_numbers(bits, vector_size, error):
    table = codebooks.gaussian(bits, vector_size)
    values = np.random.default_rng(0).standard_normal((200_000, vector_size))
    distance, _ = cKDTree(table).query(values)
    assert np.square(distance).mean() / vector_size == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("vector_size", [1, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_gaussian_points_are_the_means_of_their_cells(bits, vector_size):
    table = codebooks.gaussian(bits, vector_size)
    assert table.shape == (2**bits, vector_size) and table.dtype == np.float32
    axis = np.arange(-7, 7, 2e-5 if vector_size == 1 else 0.02) + 1e-5
    values = np.stack(np.meshgrid(*[axis] * vector_size), axis=-1).reshape(-1, vector_size)
    weights = np.exp(-0.5 * np.square(values).sum(axis=1))
    _, cell = cKDTree(table).query(values)
    mass = np.bincount(cell, weights, len(table))
    means = np.stack([np.bincount(cell, weights * v, len(table)) / mass for v in values.T], axis=1)
    # up to the lattice, and in the plane to where the search stopped
    np.testing.assert_allclose(means, table, atol=1e-4 if vector_size == 1 else 2e-2)


def test_nearest_vectors_against_brute_force():
    table = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    values = np.random.default_rng(1).standard_normal((3, 9, 5)).astype(np.float32)
    codes = np.asarray(codebooks.nearest_vectors(jnp.asarray(values), table))
    assert codes.shape == (3, 5, 5) and codes.dtype == np.uint8
    pairs = np.pad(values, ((0, 0), (0, 1), (0, 0))).reshape(3, 5, 2, 5).swapaxes(2, 3)
    distances = np.square(pairs[..., None, :] - table).sum(axis=-1)
    np.testing.assert_array_equal(codes, distances.argmin(axis=-1))


def test_there_are_gaussian_tables_of_single_values_and_pairs_only():
    with pytest.raises(ValueError, match="exists for vector_size 1 and 2, not 3"):
        codebooks.gaussian(4, vector_size=3)
    np.testing.assert_array_equal(codebooks.codebook("gaussian", 4), codebooks.gaussian(4)[:, 0])
