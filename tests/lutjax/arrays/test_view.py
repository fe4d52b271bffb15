import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.arrays import MatrixView

SHAPES = [
    (6, 4), (4, 6), (2, 3, 4), (4, 2, 3), (1, 24), (24, 1), (2, 12), (3, 2, 4), (2, 2, 6),
    (1, 6, 4, 1), (12, 2), (24,), (2, 3, 2, 2),
]  # fmt: skip


def assert_is_view(view, array, matrix):
    assert view.shape(*matrix.shape) == array.shape
    np.testing.assert_array_equal(view.from_matrix(matrix), array)
    np.testing.assert_array_equal(view.to_matrix(array), matrix)


@pytest.mark.parametrize("seed", range(60))
def test_random_transposes_and_reshapes_of_the_same_data(seed):
    rng = np.random.default_rng(seed)
    array = jnp.arange(24).reshape(SHAPES[rng.integers(len(SHAPES))])
    contract = rng.permutation(array.ndim)[: rng.integers(1, array.ndim + 1)].tolist()
    view = MatrixView.of(array.shape, contract)
    matrix = view.to_matrix(array)
    for _ in range(4):
        assert_is_view(view, array, matrix)
        if rng.random() < 0.5:
            permutation = rng.permutation(array.ndim).tolist()
            view, array = view.transpose(permutation), array.transpose(permutation)
        else:
            shape = SHAPES[rng.integers(len(SHAPES))]
            reshaped = view.reshape(array.shape, shape)
            if reshaped is not None:
                view, array = reshaped, array.reshape(shape)


@pytest.mark.parametrize(
    ("shape", "contract", "new", "possible"),
    [
        ((6, 4), (0,), (2, 3, 2, 2), True),  # both sides split
        ((6, 2, 2), (0,), (6, 4), True),  # heads merged
        ((6, 4), (0,), (24,), False),  # K and N mixed
        ((6, 4), (0,), (4, 6), False),
        ((6, 4), (0,), (1, 6, 1, 4), True),
        ((2, 3, 4), (0, 1), (6, 4), True),
        ((2, 4, 3), (0, 2), (2, 12), False),
    ],
)
def test_which_reshapes_are_views(shape, contract, new, possible):
    assert (MatrixView.of(shape, contract).reshape(shape, new) is not None) == possible


def test_sizes_follow_sliced_data():
    view = MatrixView.of((512, 8, 64), contract=(0,))
    assert view.shape(512, 2 * 64) == (512, 2, 64)
    assert view.shape(128, 512) == (128, 8, 64)


def test_the_derived_size_is_the_outermost_that_is_not_one():
    view = MatrixView.of((512, 1, 64), contract=(0,))
    assert view.shape(512, 2 * 16) == (512, 1, 32)
    assert view.deriving((512, 1, 64), axis=1).shape(512, 2 * 64) == (512, 2, 64)
    assert view.deriving((512, 1, 64), axis=1).deriving((512, 1, 64)) == view
