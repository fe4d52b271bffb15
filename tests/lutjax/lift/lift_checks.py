"""How lifted functions are compared with the same functions on dense weights."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lutjax
from lutjax.transforms.quantize import weight_view

# float32: both sides round differently only in the order of sums.
TOLERANCE = 1e-5


def weight(*shape, seed=0, axis=None, batch_ndim=None, bits=4, group_size=16):
    """A weight of random codes and scales; ``quantize`` would be compiled for each shape."""
    config = lutjax.LutConfig(
        bits=bits, group_size=group_size, codebook=(0.0, 1.0) * 2 ** (bits - 1)
    )
    rule = lutjax.Rule("*", config, axis=axis, batch_ndim=batch_ndim)
    count, view = weight_view(shape, rule, "kernel")
    batch = shape[:count]
    k = math.prod(shape[count + a] for a in view.k_axes)
    n = math.prod(shape[count + a] for a in view.n_axes)
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.5, 1.5, (*batch, -(-k // group_size), n)) / np.sqrt(k)
    return lutjax.LutArray(
        words=jnp.asarray(rng.integers(0, 256, (*batch, -(-k // 8), bits, n), np.uint8)),
        scales=jnp.asarray(scales, jnp.float32),
        lut=jnp.asarray(rng.normal(size=(*batch, 1, 2**bits, 1)), jnp.float32),
        offsets=None,
        group_size=group_size,
        padding=-k % 8,
        dtype=np.dtype(np.float32),
        view=view,
    )


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Relative to the largest magnitude of each leaf; structure, shape and dtype are equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, (a, e)
        if jnp.issubdtype(e.dtype, jnp.inexact):
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            scale = max(np.abs(e[np.isfinite(e)]).max(initial=0), 1e-30)
            np.testing.assert_allclose(a / scale, e / scale, atol=tolerance, rtol=0)
        elif jnp.issubdtype(e.dtype, jax.dtypes.prng_key):
            assert (jax.random.key_data(a) == jax.random.key_data(e)).all()
        else:
            np.testing.assert_array_equal(a, e)


def assert_lifted(fn, params, *args, strict=True, gradients=True, tolerance=TOLERANCE):
    """``lift(fn)`` equals ``fn`` on the materialised weights, gradients of ``args`` included.

    All of it is one program, because compiling is what takes the time.
    """
    lifted = lutjax.lift(fn, strict=strict)
    places = tuple(
        i
        for i, a in enumerate(args, 1)
        if gradients and all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(a))
    )

    def run(f, params, *args):
        def loss(params, *args):
            out = f(params, *args)
            floats = [y for y in jax.tree.leaves(lutjax.materialize(out)) if y.dtype == jnp.float32]
            return sum(jnp.sum(jnp.square(y)) for y in floats), out

        if not places:
            return loss(params, *args)[1], ()
        slopes, out = jax.grad(loss, argnums=places, has_aux=True)(params, *args)
        return out, slopes

    # Compiled without LLVM's optimisations: these programs are tiny and run once.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(params, *args):
        return run(lifted, params, *args), run(fn, lutjax.materialize(params), *args)

    actual, expected = both(params, *args)
    assert_close(lutjax.materialize(actual), expected, tolerance)
    return actual[0]
