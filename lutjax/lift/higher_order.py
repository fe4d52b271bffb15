"""Primitives that hold programs of their own, re-emitted through JAX's public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from lutjax.lift.custom_derivatives import custom_derivative
from lutjax.lift.manual import shard_map
from lutjax.lift.values import Packer, Weight

_DOT_GENERAL = jex.primitives.dot_general_p


def _jit(eqn: Any, operands: list, evaluator: Any) -> list:
    """Inlined: the compiled program is the same, and ``jax.jit`` belongs around ``lift``."""
    params = eqn.params
    values = _constrain(operands, params["in_shardings"])
    with jax.named_scope(params["name"]):
        outputs = evaluator(params["jaxpr"].jaxpr, params["jaxpr"].consts, values)
    return _constrain(outputs, params["out_shardings"])


def _constrain(values: list, shardings: Any) -> list:
    """Applies the shardings that a user gave to an inner jit to the dense values."""
    return [
        jax.lax.with_sharding_constraint(x, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and not isinstance(x, Weight)
        else x
        for x, sharding in zip(values, shardings, strict=True)
    ]


def _call(eqn: Any, operands: list, evaluator: Any) -> list:
    closed = eqn.params["call_jaxpr"]
    return evaluator(closed.jaxpr, closed.consts, operands)


def _scan(eqn: Any, operands: list, evaluator: Any) -> list:
    params = eqn.params
    count_consts, count_carry = _scan_counts(params)
    closed = params["jaxpr"]
    consts, init = operands[:count_consts], operands[count_consts:][:count_carry]
    xs = [
        evaluator.dense(x, "scan", eqn) if isinstance(x, Weight) and not x.array.batch_shape else x
        for x in operands[count_consts + count_carry :]  # rows of a matrix are no weights
    ]
    constant = _constant_weights(init, closed.jaxpr, count_consts)
    init = _without(constant, init, "scan carry", eqn, evaluator)
    xs_packer, outputs = Packer(xs), Packer(())

    def body(carry: tuple, x: tuple) -> tuple:
        nonlocal outputs
        values = [*consts, *_merge(carry, constant), *xs_packer.unpack(x)]
        out = evaluator(closed.jaxpr, closed.consts, values)
        new = _without(constant, out[:count_carry], "scan carry", eqn, evaluator)
        outputs = Packer(out[count_carry:])
        return tuple(new), Packer.pack(out[count_carry:])

    ys: tuple
    carry, ys = jax.lax.scan(
        body,
        tuple(init),
        xs_packer.pack(xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*_merge(carry, constant), *outputs.unpack(ys)]


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # trees of operands, since jax 0.12
    return len(list(consts)), len(list(carry))


def _while(eqn: Any, operands: list, evaluator: Any) -> list:
    params = eqn.params
    count_cond, count_body = params["cond_nconsts"], params["body_nconsts"]
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts, body_consts = operands[:count_cond], operands[count_cond:][:count_body]
    init = operands[count_cond + count_body :]
    constant = _constant_weights(init, body.jaxpr, count_body)
    init = _without(constant, init, "while carry", eqn, evaluator)

    def run_condition(carry: tuple) -> Any:
        values = [*cond_consts, *_merge(carry, constant)]
        return evaluator(condition.jaxpr, condition.consts, values)[0]

    def run_body(carry: tuple) -> tuple:
        out = evaluator(body.jaxpr, body.consts, [*body_consts, *_merge(carry, constant)])
        return tuple(_without(constant, out, "while carry", eqn, evaluator))

    return _merge(jax.lax.while_loop(run_condition, run_body, tuple(init)), constant)


def _constant_weights(init: list, body: Any, skip: int) -> dict[int, Weight]:
    """The weights that a loop carries around without changing them, by place in the carry."""
    return {
        i: x
        for i, x in enumerate(init)
        if isinstance(x, Weight) and body.outvars[i] is body.invars[skip + i]
    }


def _without(constant: dict[int, Weight], carry: list, name: str, eqn: Any, evaluator: Any) -> list:
    """The rest of a carry, dense, with None in the places of what does not change."""
    return [None if i in constant else evaluator.dense(x, name, eqn) for i, x in enumerate(carry)]


def _merge(carry: Any, constant: dict[int, Weight]) -> list:
    return [constant.get(i, x) for i, x in enumerate(carry)]


def _cond(eqn: Any, operands: list, evaluator: Any) -> list:
    index, *values = operands
    packer = Packer(values)
    branches = eqn.params["branches"]
    kept = _compressed_results(branches, values, evaluator)
    outputs = Packer(())

    def branch(closed: Any) -> Callable:
        def run(*arrays: Any) -> tuple:
            nonlocal outputs
            out = evaluator(closed.jaxpr, closed.consts, packer.unpack(arrays))
            out = [y if i in kept else evaluator.dense(y, "cond output", eqn)
                   for i, y in enumerate(out)]  # fmt: skip
            outputs = Packer(out)
            return Packer.pack(out)

        return run

    runs, platforms = [branch(closed) for closed in branches], eqn.params.get("branches_platforms")
    if platforms is None:
        results = jax.lax.switch(index, runs, *packer.pack(values))  # fills in ``outputs``
        return outputs.unpack(results)
    # ``jax.lax.platform_dependent``: a branch may only compile for its own platforms.
    named = {name: run for run, names in zip(runs, platforms, strict=True) for name in names or ()}
    default = next((r for r, names in zip(runs, platforms, strict=True) if names is None), None)
    results = jax.lax.platform_dependent(*packer.pack(values), default=default, **named)
    return outputs.unpack(results)


def _compressed_results(branches: Any, values: list, evaluator: Any) -> frozenset[int]:
    """Places of results that every branch gives in one and the same compressed form."""
    shapes = {x.array.shape for x in values if isinstance(x, Weight)}
    places = [i for i, v in enumerate(branches[0].jaxpr.outvars) if v.aval.shape in shapes]
    if not places:
        return frozenset()
    packer, kinds = Packer(values), []
    quiet = evaluator.quiet()
    for closed in branches:
        out = jax.eval_shape(
            lambda *arrays, c=closed: Packer.pack(quiet(c.jaxpr, c.consts, packer.unpack(arrays))),
            *packer.pack(values),
        )
        kinds.append([jax.tree.map(lambda a: (a.shape, a.dtype), y) for y in out])
    return frozenset(i for i in places if all(k[i] == kinds[0][i] for k in kinds))


def _remat(eqn: Any, operands: list, evaluator: Any) -> list:
    params = eqn.params
    packer, outputs = Packer(operands), Packer(())
    policy = params["policy"]
    if policy is not None:
        evaluator = evaluator.marking()
        policy = _policy_about_products(policy, evaluator.saved_products)

    def run(*arrays: Any) -> tuple:
        nonlocal outputs
        out = evaluator(params["jaxpr"], (), packer.unpack(arrays))
        outputs = Packer(out)
        return Packer.pack(out)

    run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=policy)
    results = run(*packer.pack(operands))  # fills in ``outputs``
    return outputs.unpack(results)


def _policy_about_products(policy: Callable, products: dict[str, Any]) -> Callable:
    """A policy that is asked about marked products as if they were the dot_general they replace."""

    def about(primitive: Any, *avals: Any, **params: Any) -> Any:
        eqn = products.get(params.get("name", "")) if primitive.name == "name" else None
        if eqn is None:
            return policy(primitive, *avals, **params)
        return policy(_DOT_GENERAL, *(v.aval for v in eqn.invars), **eqn.params)

    return about


HIGHER_ORDER: dict[str, Callable[[Any, list, Any], Any]] = {
    "jit": _jit,
    "closed_call": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _remat,  # jax.checkpoint
    "custom_jvp_call": custom_derivative,
    "custom_vjp_call": custom_derivative,
    "shard_map": shard_map,
}
"""Rules ``(equation, operands, evaluator) -> results`` by the name of the primitive."""
