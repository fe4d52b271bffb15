import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.layout import block_code, pack, packed_shape, unpack


def reference_words(codes, bits):
    """The layout from its definition: eight codes are one little-endian integer of b bytes."""
    k, n = codes.shape
    codes = np.concatenate([codes, np.zeros((-k % 8, n), int)]).reshape(-1, 8, n)
    words = np.zeros((codes.shape[0], bits, n), np.uint8)
    for block in range(codes.shape[0]):
        for column in range(n):
            number = sum(int(c) << (bits * i) for i, c in enumerate(codes[block, :, column]))
            words[block, :, column] = list(number.to_bytes(bits, "little"))
    return words


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (8, 3), (13, 5), (32, 2)])
def test_pack_follows_the_definition(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape)
    words = pack(jnp.asarray(codes), bits)
    assert words.shape == packed_shape(shape, bits) and words.dtype == jnp.uint8
    np.testing.assert_array_equal(words, reference_words(codes, bits))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 40),
    st.integers(1, 9),
)
def test_unpack_inverts_pack(bits, batch, k, n):
    codes = np.random.default_rng(k).integers(0, 2**bits, (*batch, k, n), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(codes), bits), k), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_splitting_needs_no_repacking(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (32, 7), dtype=np.uint8)
    words = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack(words[:, :, 2:5]), codes[:, 2:5])
    np.testing.assert_array_equal(unpack(words[1:3]), codes[8:24])
    np.testing.assert_array_equal(block_code(words, 5), codes[5::8])


def test_works_under_transformations():
    codes = jnp.arange(48, dtype=jnp.uint8).reshape(2, 8, 3) % 8
    words = jax.jit(jax.vmap(lambda c: pack(c, 3)))(codes)
    np.testing.assert_array_equal(words, pack(codes, 3))
    assert jax.eval_shape(lambda c: pack(c, 3), codes).shape == (2, 1, 3, 3)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"bits=9.*1 to 8"):
        pack(jnp.zeros((8, 1), jnp.uint8), 9)
    with pytest.raises(TypeError, match="float32"):
        pack(jnp.zeros((8, 1)), 4)
    with pytest.raises(ValueError, match=r"\[\.\.\., K, N\]"):
        pack(jnp.zeros(8, jnp.uint8), 4)
    with pytest.raises(ValueError, match="k=9"):
        unpack(jnp.zeros((1, 4, 1), jnp.uint8), 9)
    with pytest.raises(TypeError, match="uint8"):
        unpack(jnp.zeros((1, 4, 1), jnp.uint32))
