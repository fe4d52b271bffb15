"""Functions with a derivative rule of their own, called with compressed weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lutjax.lift.values import Packer, Weight, bind, logical


def custom_derivative(eqn: Any, operands: list, evaluator: Any) -> list:
    """Re-emits a custom_jvp or custom_vjp call as a custom_vjp of compressed operands.

    The user's rule is kept: ``jax.vjp`` of the original call, traced with the logical shapes,
    yields its forward and backward programs, and these are evaluated on the compressed operands.
    Weights may be residuals, which then stay compressed; they get no cotangent. Forward-mode
    differentiation is not possible, as through any product with a compressed weight.
    """
    name = eqn.primitive.name
    closed = eqn.params["call_jaxpr"]
    packer = Packer(operands)
    active = [i for i, x in enumerate(operands) if not isinstance(x, Weight) and _is_float(x)]
    residual_packer, pullback_tree = Packer(()), jax.tree.structure(())

    def dense(values: list) -> list:
        return [evaluator.dense(y, name, eqn) for y in values]

    @jax.custom_vjp
    def call(*arrays: Any) -> list:
        return dense(evaluator(closed.jaxpr, closed.consts, packer.unpack(arrays)))

    def forward(*arrays: Any) -> tuple:
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
        return dense(results[:count]), Packer.pack(results[count:])

    def backward(arrays: tuple, cotangents: list) -> tuple:
        residuals = residual_packer.unpack(arrays)
        given = [g for g in cotangents if g.dtype != jax.dtypes.float0]

        def pull(leaves: list, given: list) -> Any:
            rest = iter(given)
            full = [g if g.dtype == jax.dtypes.float0 else next(rest) for g in cotangents]
            return jax.tree.unflatten(pullback_tree, leaves)(full)

        program = jax.make_jaxpr(pull)([logical(r) for r in residuals], given)
        results = dense(evaluator(program.jaxpr, program.consts, [*residuals, *given]))
        gradients: list[Any] = [None] * len(operands)
        for i, gradient in zip(active, results, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    call.defvjp(forward, backward)
    return call(*packer.pack(operands))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
