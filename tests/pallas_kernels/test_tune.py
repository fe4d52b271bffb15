"""What the tuner takes for right."""

import jax
import jax.numpy as jnp

from pallas_kernels.layout import packed_shape
from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.tune import GROUP, LIMIT, relative_error


def test_a_wrong_product_is_told_from_a_right_one():
    keys = jax.random.split(jax.random.key(0), 3)
    words = jax.random.bits(keys[0], packed_shape((256, 64), 4), jnp.uint8)
    scales, lut = jnp.ones((256 // GROUP, 64), jnp.bfloat16), jax.random.normal(keys[1], (1, 16, 1))
    x = jax.random.normal(keys[2], (16, 256), jnp.bfloat16)
    y = lut_matmul(x, words, scales, lut, k=256, group_size=GROUP)
    assert relative_error(y, x, words, scales, lut) <= LIMIT
    for wrong in (y[::-1], y.at[0, 0].set(jnp.nan), y * 1.02):
        assert not relative_error(wrong, x, words, scales, lut) <= LIMIT
