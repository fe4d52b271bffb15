import jax
import jax.numpy as jnp

from pallas_kernels.device_time import busy_seconds


def test_there_is_no_busy_time_without_a_gpu():
    assert jax.default_backend() == "gpu" or busy_seconds(jax.jit(jnp.sin), jnp.ones(3)) is None
