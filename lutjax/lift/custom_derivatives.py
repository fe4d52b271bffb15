"""Functions with a derivative rule of their own, called with compressed weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from lutjax.lift.values import Packer, Weight, bind, logical
from pallas_kernels.manual_axes import in_manual_axes
from pallas_kernels.static_flags import flag, is_on


def custom_derivative(eqn: Any, operands: list, evaluator: Any) -> list:
    """Re-emits a custom_jvp or custom_vjp call as a custom_vjp of compressed operands.

    The user's rule is kept: ``jax.vjp`` of the original call, traced with the logical shapes,
    yields its forward and backward programs, and these are evaluated on the compressed operands.
    Weights may be residuals, which then stay compressed. The gradient that the rule has for a dense
    weight is handed on to the parts that make it up; it is computed only if one of them is
    differentiated. Forward-mode differentiation is not possible, as through any product with a
    compressed weight.
    """
    name = eqn.primitive.name
    closed = eqn.params["call_jaxpr"]
    if any(_observes(x) for x in operands):
        return evaluator(closed.jaxpr, closed.consts, operands)
    packer = Packer(operands)
    active = [i for i, x in enumerate(operands) if _is_float(x)]
    residual_packer, pullback_tree = Packer(()), jax.tree.structure(())

    def dense(values: list) -> list:
        return [evaluator.dense(y, name, eqn) for y in values]

    def call(*arrays: Any) -> list:
        return dense(evaluator(closed.jaxpr, closed.consts, packer.unpack(arrays)))

    def forward(*arrays: Any, wanted: list[bool] | None = None) -> tuple:
        nonlocal residual_packer
        values = packer.unpack(arrays)

        def with_residuals(*given: Any) -> tuple:
            nonlocal pullback_tree

            def of_active(*chosen: Any) -> list:
                merged = list(given)
                for i, x in zip(active, chosen, strict=True):
                    merged[i] = x
                return bind(eqn, merged)

            out, pullback = jax.vjp(of_active, *(given[i] for i in active))
            residuals, pullback_tree = jax.tree.flatten(pullback)
            return out, residuals

        program = jax.make_jaxpr(with_residuals)(*map(logical, values))
        results = evaluator(program.jaxpr, program.consts, values)
        count = len(eqn.outvars)
        residual_packer = Packer(results[count:])
        wanted = wanted or [True] * len(values)
        flags = [flag(wanted[i]) for i in active]
        weights = tuple(
            (x.array if on else jax.tree.map(_empty, x.array)) if isinstance(x, Weight) else None
            for x, on in zip(values, wanted, strict=True)
        )
        return dense(results[:count]), (flags, weights, Packer.pack(results[count:]))

    def lean_forward(*primals: Any) -> tuple:
        """The forward rule where JAX says which arrays are differentiated."""
        wanted = [any(p.perturbed for p in jax.tree.leaves(x)) for x in primals]
        return forward(*jax.tree.map(lambda p: p.value, primals), wanted=wanted)

    def backward(kept: tuple, cotangents: list) -> tuple:
        flags, weights, arrays = kept
        residuals = residual_packer.unpack(arrays)
        places = [place for place, on in enumerate(flags) if is_on(on)]
        cotangents = [_instantiate(g) for g in cotangents]
        given = [g for g in cotangents if g.dtype != jax.dtypes.float0]

        def pull(leaves: list, given: list) -> Any:
            rest = iter(given)
            full = [g if g.dtype == jax.dtypes.float0 else next(rest) for g in cotangents]
            found = jax.tree.unflatten(pullback_tree, leaves)(full)
            return [found[place] for place in places]

        program = jax.make_jaxpr(pull)([logical(r) for r in residuals], given)
        results = dense(evaluator(program.jaxpr, program.consts, [*residuals, *given]))
        gradients: list[Any] = [None] * len(operands)
        for place, gradient in zip(places, results, strict=True):
            i = active[place]
            if isinstance(operands[i], Weight):
                weight = Weight(weights[i], operands[i].path)
                gradient = _gradient_of_parts(weight, gradient)
            gradients[i] = gradient
        return tuple(gradients)

    # shard_map cannot differentiate a custom_vjp that takes symbolic zeros.
    manual = in_manual_axes()
    run = jax.custom_vjp(call)
    run.defvjp(forward if manual else lean_forward, backward, symbolic_zeros=not manual)
    return run(*packer.pack(operands))


def _gradient_of_parts(weight: Weight, gradient: jax.Array) -> Any:
    """The gradient of a dense weight as one of the arrays that it is made of."""
    _, pullback = jax.vjp(lambda array: array.materialize(), weight.array)
    return pullback(gradient)[0]


def _empty(array: jax.Array) -> jax.Array:
    """Stands for a residual that will not be needed; the structure stays as it is."""
    return jnp.zeros((0,), array.dtype)


def _instantiate(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    zeros = np.zeros if cotangent.dtype == jax.dtypes.float0 else jnp.zeros
    return zeros(cotangent.shape, cotangent.dtype)


def _observes(x: Any) -> bool:
    """Whether a weight looks at its products as they are differentiated by JAX."""
    if not isinstance(x, Weight):
        return False
    nodes = jax.tree.leaves(x.array, is_leaf=lambda node: getattr(node, "observes", False))
    return any(getattr(node, "observes", False) for node in nodes)


def _is_float(x: Any) -> bool:
    dtype = x.array.dtype if isinstance(x, Weight) else jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.inexact)
