"""Settings that every test runs under: no silent promotion, and as few threads as the machine has."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
