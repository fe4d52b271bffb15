"""Evaluates a jaxpr whose inputs may be compressed weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from lutjax.arrays import CompressedArray, is_compressed
from lutjax.lift.report import Recorder
from lutjax.lift.rules import NEEDS_DENSE, PRODUCTS, RULES


@dataclasses.dataclass(frozen=True)
class Weight:
    """A compressed value within the evaluation, and the parameter path that it came from."""

    array: CompressedArray
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return self.array.shape


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], recorder: Recorder) -> list:
    """Runs an open jaxpr on values of which some are :class:`Weight`.

    Returns:
      The outputs; an output may be a :class:`Weight` again.
    """
    env: dict[Any, Any] = {}
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if _is_var(v)}
    kept = {v for v in jaxpr.outvars if _is_var(v)}

    def read(v: Any) -> Any:
        return env[v] if _is_var(v) else v.val

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(v) for v in eqn.invars]
        with _context(eqn):
            outputs = _apply(eqn, operands, recorder)
        env.update(zip(eqn.outvars, outputs, strict=True))
        for v in eqn.invars:  # eagerly run programs should not hold every intermediate
            if _is_var(v) and last_use[v] == i and v not in kept:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: Any, operands: list, recorder: Recorder) -> list:
    if not any(isinstance(x, Weight) for x in operands):
        return bind(eqn, operands)
    name = eqn.primitive.name
    if name in HIGHER_ORDER:
        outputs = HIGHER_ORDER[name](eqn, operands, recorder)
        if outputs is not NEEDS_DENSE:
            return outputs
    if name in RULES:
        arrays = [x.array if isinstance(x, Weight) else x for x in operands]
        result = RULES[name](eqn.params, *arrays)
        if result is not NEEDS_DENSE:
            return _note(eqn, name, operands, result, recorder)
    return bind(eqn, [dense(x, name, recorder) for x in operands])


def _note(eqn: Any, name: str, operands: list, result: Any, recorder: Recorder) -> list:
    """Records a rule's success and gives compressed results the path of their operand."""
    weights = [x for x in operands if isinstance(x, Weight)]
    results = list(result) if eqn.primitive.multiple_results else [result]
    if name in PRODUCTS:
        for weight in weights:
            recorder.fused(weight.path, name)
    if eqn.primitive.multiple_results:  # operand i becomes result i
        paths = [x.path if isinstance(x, Weight) else "" for x in operands]
    else:
        paths = [" + ".join(dict.fromkeys(w.path for w in weights))]
    return [
        Weight(r, path) if is_compressed(r) else r for r, path in zip(results, paths, strict=True)
    ]


def bind(eqn: Any, operands: list) -> list:
    """Runs a primitive on dense operands as it stands."""
    bind_params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bind_params if isinstance(bind_params, tuple) else ((), bind_params)
    result = eqn.primitive.bind(*functions, *operands, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def dense(x: Any, primitive: str, recorder: Recorder) -> Any:
    """The dense form of a value, recorded as the work of ``primitive``."""
    if not isinstance(x, Weight):
        return x
    recorder.materialized(x.path, primitive, x.array)
    return x.array.materialize()


class Packer:
    """Carries values across a JAX transformation: weights as pytrees, their paths beside them."""

    def __init__(self, values: Sequence[Any]):
        self._paths = [x.path if isinstance(x, Weight) else None for x in values]

    @staticmethod
    def pack(values: Sequence[Any]) -> tuple:
        """The bare arrays, pytrees that any transformation takes."""
        return tuple(x.array if isinstance(x, Weight) else x for x in values)

    def unpack(self, arrays: Sequence[Any]) -> list:
        """The values again, within the transformation."""
        return [
            a if path is None else Weight(a, path)
            for a, path in zip(arrays, self._paths, strict=True)
        ]


def _jit(eqn: Any, operands: list, recorder: Recorder) -> list:
    closed = eqn.params["jaxpr"]
    return evaluate(closed.jaxpr, closed.consts, operands, recorder)


def _scan(eqn: Any, operands: list, recorder: Recorder) -> list:
    params = eqn.params
    count_consts, count_carry = params["num_consts"], params["num_carry"]
    closed = params["jaxpr"]
    consts = operands[:count_consts]
    init = [dense(x, "scan carry", recorder) for x in operands[count_consts:][:count_carry]]
    xs = operands[count_consts + count_carry :]
    const_packer, xs_packer = Packer(consts), Packer(xs)
    packed_consts = const_packer.pack(consts)

    def body(carry, x):
        values = [*const_packer.unpack(packed_consts), *carry, *xs_packer.unpack(x)]
        out = evaluate(closed.jaxpr, closed.consts, values, recorder)
        out = [dense(y, "scan output", recorder) for y in out]
        return tuple(out[:count_carry]), tuple(out[count_carry:])

    carry, ys = jax.lax.scan(
        body,
        tuple(init),
        xs_packer.pack(xs),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params["_split_transpose"],
    )
    return [*carry, *ys]


def _while(eqn: Any, operands: list, recorder: Recorder) -> list:
    params = eqn.params
    count_cond, count_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts = operands[:count_cond]
    body_consts = operands[count_cond:][:count_body]
    init = [dense(x, "while carry", recorder) for x in operands[count_cond + count_body :]]
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]

    def run_condition(carry):
        values = [*cond_consts, *carry]
        return evaluate(condition.jaxpr, condition.consts, values, recorder)[0]

    def run_body(carry):
        out = evaluate(body.jaxpr, body.consts, [*body_consts, *carry], recorder)
        return tuple(dense(y, "while output", recorder) for y in out)

    return list(jax.lax.while_loop(run_condition, run_body, tuple(init)))


def _cond(eqn: Any, operands: list, recorder: Recorder) -> list:
    index, *values = operands
    packer = Packer(values)

    def branch(closed):
        def run(*arrays):
            out = evaluate(closed.jaxpr, closed.consts, packer.unpack(arrays), recorder)
            return [dense(y, "cond output", recorder) for y in out]

        return run

    branches = [branch(closed) for closed in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *packer.pack(values))


def _remat(eqn: Any, operands: list, recorder: Recorder) -> list:
    params = eqn.params
    packer = Packer(operands)

    def run(*arrays):
        out = evaluate(params["jaxpr"], (), packer.unpack(arrays), recorder)
        return [dense(y, "checkpoint output", recorder) for y in out]

    run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(*packer.pack(operands))


HIGHER_ORDER: dict[str, Callable[[Any, list, Recorder], Any]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": lambda eqn, operands, recorder: evaluate(
        eqn.params["call_jaxpr"].jaxpr, eqn.params["call_jaxpr"].consts, operands, recorder
    ),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "checkpoint": _remat,
    "remat": _remat,
    "remat2": _remat,
}
"""Primitives that hold a program of their own, by name."""


def _is_var(v: Any) -> bool:
    return not isinstance(v, jex.Literal)


def _context(eqn: Any) -> contextlib.AbstractContextManager:
    """The settings (mesh, compute type, metadata) that the equation was traced under."""
    return getattr(getattr(eqn, "ctx", None), "manager", contextlib.nullcontext())
