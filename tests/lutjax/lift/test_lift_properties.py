"""Random functions out of the supported primitives: lifted equals dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lift_checks import assert_close, normal, weight

import lutjax

# Steps rearrange one square weight [32, 32] and leave it square; uses consume it.
STEPS = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(4, 8, 32).reshape(32, 32),
    "expand": lambda w: w[None][0],
    "halves": lambda w: jnp.concatenate(jnp.split(w, 2, axis=1), axis=1),
    "halves of rows": lambda w: jnp.concatenate([w[:16], w[16:]], axis=0),
    "swapped": lambda w: jnp.concatenate([w[:, 16:], w[:, :16]], axis=1),
    "twice": lambda w: w + w,
    "stack": lambda w: jnp.stack([w, w])[1],
    "jit": lambda w: jax.jit(lambda w: w.T.T)(w),
    "cond": lambda w: jax.lax.cond(jnp.array(True), lambda w: w, lambda w: w.T.T, w),
    "barrier": lambda w: jax.lax.optimization_barrier((w, jnp.ones(2)))[0],
    "stop": jax.lax.stop_gradient,
    "float": lambda w: w.astype(jnp.float32),
}
USES = {
    "matmul": lambda w, x: x @ w,
    "transposed": lambda w, x: x @ w.T,
    "heads": lambda w, x: jnp.einsum("bd,dhe->bhe", x, w.reshape(32, 4, 8)).reshape(x.shape),
    "lookup": lambda w, x: x + jnp.take(w, jnp.array([3, 31]), axis=0),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "scan": lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0],
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x),
    "columns": lambda w, x: jnp.tile(x @ w[:, :16], 2),
    "two": lambda w, x: (x @ w) @ w,
}


# Some sequences need the dense weight; they must be right all the same.
@pytest.mark.filterwarnings("ignore::lutjax.MaterializationWarning")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layers=st.lists(
        st.tuples(st.lists(st.sampled_from(sorted(STEPS)), max_size=4),
                  st.sampled_from(sorted(USES))),
        min_size=1, max_size=3,
    ),
    kind=st.sampled_from(["lut", "low rank", "sum"]),
    bits=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_random_programs(layers, kind, bits, seed):
    lut = weight(32, 32, bits=bits, seed=seed)
    # Sums of about one: where tanh saturates, 1 - tanh² has lost most of its digits.
    lut = dataclasses.replace(lut, scales=lut.scales / 8)
    low_rank = lutjax.LowRankArray.of(normal(32, 3, seed=seed) / 8, normal(3, 32, seed=seed + 1))
    w = {"lut": lut, "low rank": low_rank, "sum": lutjax.SumArray.of(lut, low_rank)}[kind]

    def fn(w, x):
        for steps, use in layers:
            v = w
            for step in steps:
                v = STEPS[step](v)
            x = jnp.tanh(USES[use](v, x))
        return x

    def run(fn, w, x):
        return jax.value_and_grad(lambda x: jnp.sum(fn(w, x) ** 2))(x)

    @jax.jit
    def both(w, x):
        return run(lutjax.lift(fn), w, x), run(fn, w.materialize(), x)

    actual, expected = both(w, normal(2, 32, seed=seed + 2))
    # Up to seven products in a row, each rounded differently.
    assert_close(actual, expected, 5e-5)
    assert np.isfinite(expected[0])
