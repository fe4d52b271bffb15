"""The blocked rotation against its matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.rotation import rotate, rotate_back, signs


def walsh(size: int) -> np.ndarray:
    """The Hadamard matrix from its definition: the parity of the common bits of both indices."""
    index = np.arange(size)
    common = index[:, None] & index[None, :]
    return np.array([[(-1.0) ** int(c).bit_count() for c in row] for row in common])


def matrix(k: int, block: int) -> np.ndarray:
    """R in float64: ``rotate(x) = x @ R.T``."""
    result, start = np.zeros((k, k)), 0
    while start < k:
        size = min(block, 2 ** int(np.log2(k - start)))
        place = slice(start, start + size)
        first = start % block
        result[place, place] = walsh(size) * signs(block)[first : first + size] / np.sqrt(size)
        start += size
    return result


@pytest.mark.parametrize(("k", "block"), [(64, 64), (64, 16), (1, 32), (100, 32), (72, 64)])
def test_against_the_matrix(k, block):
    r = matrix(k, block)
    np.testing.assert_allclose(r @ r.T, np.eye(k), atol=1e-12)
    x = np.random.default_rng(k).standard_normal((2, 3, k)).astype(np.float32)
    np.testing.assert_allclose(rotate(jnp.asarray(x), block), x @ r.T, atol=2e-6)
    np.testing.assert_allclose(rotate_back(jnp.asarray(x), block), x @ r, atol=2e-6)


def test_the_result_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 512)), jnp.bfloat16)
    y = rotate(x, 512)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ matrix(512, 512).T
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=1e-6, rtol=2**-8)


def test_outliers_are_spread_over_their_block():
    x = np.zeros(1024, np.float32)
    x[700] = 1.0
    y = np.asarray(rotate(jnp.asarray(x), 512))
    assert not y[:512].any()
    np.testing.assert_allclose(np.abs(y[512:]), 512**-0.5, rtol=1e-6)


def test_the_signs_never_change():
    # SplitMix64 from seed 0 begins with 0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f.
    assert signs(3).tolist() == [-1, 1, 1]
    bits = np.packbits(signs(64) < 0).tobytes().hex()
    assert bits == "915f5ece208c3379"
    assert abs(int(signs(4096).sum())) < 4 * 64
    np.testing.assert_array_equal(signs(4096)[:64], signs(64))


def test_matrices_that_share_activations_rotate_them_once():
    def both(x, a, b):
        return rotate(x, 64) @ a, rotate(x, 64) @ b

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 64), (64, 8), (64, 8))]
    compiled = jax.jit(both).lower(*shapes).compile()
    # two products for the rotation, and one for each matrix
    assert compiled.cost_analysis()["flops"] < 1.1 * 2 * 4 * 64 * (2 * 8 + 2 * 8)


@pytest.mark.parametrize("block", [0, 48, -2])
def test_other_blocks_are_refused(block):
    with pytest.raises(ValueError, match=f"block={block} must be a power of two"):
        rotate(jnp.ones(96), block)
