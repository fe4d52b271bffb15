"""Statistics of the inputs of weights, taken while any lifted function runs.

A statistic leaves the function as the gradient of a field that takes no part in the product. So it
is an ordinary output: no callbacks and no global state, and ``jit``, ``scan``, ``vmap``, ``remat``
and ``shard_map`` treat it as they treat any gradient. Layers that are scanned over keep their
statistics apart; a weight that is used several times gets their sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lutjax.arrays import CompressedArray, WrapperArray
from lutjax.arrays.grouped import entry
from lutjax.lift import lift
from lutjax.paths import map_named, named_leaves

Statistic = Callable[[Any, jax.Array], jax.Array]
"""From a weight without batch axes and its input ``[M, K]`` to ``float32[n]``: a sum over rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ObservedArray(WrapperArray):
    """A weight whose field ``totals`` receives a statistic of its inputs as its gradient.

    The product over K is observed and passes no gradient on; use it to look, not to train.

    Attributes:
      base: The weight.
      totals: ``float32[*batch, n]`` of zeros.
      statistic: What to add up.

    >>> from lutjax.arrays import DenseArray
    >>> count = lambda weight, x: jnp.sum(x > 0, dtype=jnp.float32)[None]
    >>> observed = ObservedArray(DenseArray.of(jnp.eye(2)), jnp.zeros(1), count)
    >>> x = jnp.array([[1.0, -1.0], [2.0, 3.0]])
    >>> jax.grad(lambda w: w.matmul(x).sum(), allow_int=True)(observed).totals.tolist()
    [3.0]
    """

    base: CompressedArray
    totals: Float[Array, "*batch n"]
    statistic: Statistic = dataclasses.field(metadata={"static": True})
    observes: ClassVar[bool] = True

    def materialize_matrix(self) -> Float[Array, "*batch k n"]:
        """The dense matrix of the base, not observed."""
        return self.base.materialize_matrix()

    def matmul(
        self, x: Float[Array, "*batch m k"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m n"]:
        """``x @ W``, and the statistic of ``x`` for the backward pass."""
        if self.batch_shape:
            return jax.vmap(lambda w, x: w.matmul(x, out_dtype=out_dtype))(self, x)
        still = jax.lax.stop_gradient(x)
        base = jax.lax.stop_gradient(self.base)
        found = self.statistic(base, still.reshape(-1, x.shape[-1])).astype(jnp.float32)
        return _tap(base.matmul(still, out_dtype=out_dtype), x, found, self.totals)

    def matmul_grouped(
        self,
        x: Float[Array, "t m k"],
        groups: Int[Array, " t"],
        sizes: Int[Array, " t"],
        *,
        out_dtype: Any = None,
    ) -> Float[Array, "t m n"]:
        """Products of tiles, and the statistic of the rows that each entry meets."""
        still = jax.lax.stop_gradient(x)
        base = jax.lax.stop_gradient(self.base)

        def add(totals: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            rows, group, size = tile
            weight = entry(base, group)
            found = self.statistic(weight, rows)
            # Rows that only fill the tile are zeros, and there is a statistic of these too.
            padding = self.statistic(weight, jnp.zeros_like(rows[:1]))
            found -= (rows.shape[0] - size).astype(jnp.float32) * padding
            return totals.at[group].add(found), None

        zeros = jnp.zeros(self.totals.shape, jnp.float32)
        found, _ = jax.lax.scan(add, zeros, (still, groups, sizes))
        y = base.matmul_grouped(still, groups, sizes, out_dtype=out_dtype)
        return _tap(y, x, found, self.totals)

    def slice_matrix(self, axis: str, start: Any, size: int) -> Self | None:
        """Columns as the base has them: the same inputs enter."""
        base = self.base.slice_matrix(axis, start, size) if axis == "n" else None
        return None if base is None else dataclasses.replace(self, base=base)

    def matmul_transposed(
        self, x: Float[Array, "*batch m n"], *, out_dtype: Any = None
    ) -> Float[Array, "*batch m k"]:
        """``x @ W.T``, not observed."""
        return self.base.matmul_transposed(x, out_dtype=out_dtype)


@jax.custom_vjp
def _tap(y: jax.Array, x: jax.Array, found: jax.Array, totals: jax.Array) -> jax.Array:
    """``y``; in the backward pass ``totals`` receives ``found``."""
    return y


def _tap_forward(y, x, found, totals):
    return y, (y, x, found)


def _tap_backward(residuals, dy):
    # Zeros instead of gradients: the backward pass must reach earlier layers, with nothing.
    y, x, found = residuals
    return jnp.zeros_like(y), jnp.zeros_like(x), jnp.zeros_like(found), found


_tap.defvjp(_tap_forward, _tap_backward)


def observe(
    fn: Callable[..., Any], statistics: Mapping[str, tuple[Any, int, Statistic]]
) -> Callable[..., dict[str, jax.Array]]:
    """A function that runs ``fn`` and returns statistics of the inputs of its weights.

    Args:
      fn: A function of parameters and other arguments with floating-point outputs that the products
        lead to. It is lifted. It must be differentiable in reverse, so no ``while_loop`` around a
        product; the results of products under ``stop_gradient`` are not seen.
      statistics: For each path to observe: how to make the parameter a compressed array (a
        function), the length n of the statistic, and the statistic. The same function objects for
        all paths keep compilation short.

    Returns:
      A function of ``(params, *args)`` that returns ``float32[*batch, n]`` for each path; put
      ``jax.jit`` around it.

    Raises:
      TypeError: When called, if no output of ``fn`` is floating point.
    """
    lifted = lift(fn)

    def run(params: Any, *args: Any) -> dict[str, jax.Array]:
        leaves = dict(named_leaves(params))
        wrapped = {path: wrap(leaves[path]) for path, (wrap, _, _) in statistics.items()}
        totals = {
            path: jnp.zeros((*wrapped[path].batch_shape, size), jnp.float32)
            for path, (_, size, _) in statistics.items()
        }

        def total(totals: dict[str, jax.Array]) -> jax.Array:
            def place(path, leaf):
                if path not in statistics:
                    return leaf
                return ObservedArray(wrapped[path], totals[path], statistics[path][2])

            observed = map_named(place, params)
            outputs = [
                jnp.sum(y.astype(jnp.float32))
                for y in jax.tree.leaves(lifted(observed, *args))
                if jnp.issubdtype(y.dtype, jnp.floating)
            ]
            if not outputs:
                raise TypeError("fn has no floating-point output; return logits, not tokens")
            return sum(outputs[1:], start=outputs[0])

        return jax.grad(total)(totals)

    return run


@functools.lru_cache(maxsize=16)
def observer(
    fn: Callable[..., Any], statistics: tuple[tuple[str, tuple[Any, int, Statistic]], ...]
) -> Callable[..., dict[str, jax.Array]]:
    """:func:`observe` compiled, once for a function and what it is observed for.

    Args:
      fn: As for :func:`observe`.
      statistics: The items of its mapping; their functions compare equal from call to call.
    """
    return jax.jit(observe(fn, dict(statistics)))
