"""Evaluates a jaxpr whose inputs may be compressed weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from lutjax.arrays import is_compressed
from lutjax.arrays.split import explicit_mesh
from lutjax.arrays.typed_shardings import run_with_auto_axes
from lutjax.lift.higher_order import HIGHER_ORDER
from lutjax.lift.products import LOOKUPS, PRODUCTS
from lutjax.lift.registry import NEEDS_DENSE, RULES
from lutjax.lift.report import Recorder
from lutjax.lift.rules import DENSE_RULES
from lutjax.lift.values import Weight, bind


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Runs jaxprs on values of which some are :class:`Weight`.

    Attributes:
      recorder: Where uses of weights are noted.
      saved_products: Set within a ``jax.checkpoint`` that has a policy; products of weights are
        then marked, so that a policy about ``dot_general`` can be asked about them. Maps a mark to
        the equation.
    """

    recorder: Recorder
    saved_products: dict[str, Any] | None = None

    def __call__(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list:
        """Evaluates an open jaxpr; an output may be a :class:`Weight` again.

        Equations that nothing depends on are left out: the gradient rules of a user compute
        cotangents that nobody asked for.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jex.Literal) else env[v]

        eqns, freed = _schedule(jaxpr)
        for _, group in itertools.groupby(zip(eqns, freed, strict=True), key=_setting):
            members = list(group)
            with _context(members[0][0]):
                for eqn, dead in members:
                    outputs = self._apply(eqn, [read(v) for v in eqn.invars])
                    env.update(zip(eqn.outvars, outputs, strict=True))
                    for v in dead:  # a program run eagerly should not hold every intermediate
                        del env[v]
        return [read(v) for v in jaxpr.outvars]

    def dense(self, x: Any, primitive: str, eqn: Any) -> Any:
        """The dense form of a value, recorded as the work of ``primitive``."""
        if not isinstance(x, Weight):
            return x
        self.recorder.materialized(x.path, primitive, x.array, eqn)
        return x.array.materialize()

    def quiet(self) -> Evaluator:
        """One that records nothing and refuses nothing, to look ahead."""
        return Evaluator(Recorder(strict=False))

    def marking(self) -> Evaluator:
        """One that marks the products of weights, for a policy of ``jax.checkpoint``."""
        return Evaluator(self.recorder, {})

    def _apply(self, eqn: Any, operands: list) -> list:
        name = eqn.primitive.name
        if not any(isinstance(x, Weight) for x in operands):
            if name in DENSE_RULES:
                result = DENSE_RULES[name](_typed(eqn), *operands)
                if result is not NEEDS_DENSE:
                    return [result]
            return bind(eqn, operands)
        if name in HIGHER_ORDER:
            outputs = HIGHER_ORDER[name](eqn, operands, self)
            if outputs is not NEEDS_DENSE:
                return outputs
        elif name in RULES:
            arrays = [x.array if isinstance(x, Weight) else x for x in operands]
            result = _run_rule(name, eqn, arrays)
            if result is not NEEDS_DENSE:
                return self._note(eqn, name, operands, result)
        return bind(eqn, [self.dense(x, name, eqn) for x in operands])

    def _note(self, eqn: Any, name: str, operands: list, result: Any) -> list:
        """Records a rule's success and gives compressed results the path of their operand."""
        weights = [x for x in operands if isinstance(x, Weight)]
        results = list(result) if eqn.primitive.multiple_results else [result]
        if name in PRODUCTS or (name in LOOKUPS and not is_compressed(results[0])):
            for weight in weights:
                self.recorder.fused(weight.path, name, eqn)
            if self.saved_products is not None and name in PRODUCTS:
                mark = f"lutjax_product_{len(self.saved_products)}"
                self.saved_products[mark] = eqn
                results = [checkpoint_name(results[0], mark)]
        if name == "optimization_barrier":  # operand i becomes result i
            paths = [x.path if isinstance(x, Weight) else "" for x in operands]
        else:
            paths = [" + ".join(dict.fromkeys(w.path for w in weights))] * len(results)
        return [
            Weight(r, path) if is_compressed(r) else r
            for r, path in zip(results, paths, strict=True)
        ]


def _run_rule(name: str, eqn: Any, arrays: list) -> Any:
    """A rule's result; on a mesh with explicit axes, products are computed under automatic ones."""
    weights = [a for a in arrays if is_compressed(a)]
    dense_result = name in PRODUCTS or (name == "gather" and not weights[0].batch_shape)
    params = _typed(eqn) if name in PRODUCTS else eqn.params
    if not dense_result or all(explicit_mesh(w) is None for w in weights):
        return RULES[name](params, *arrays)

    def compute(*arrays: Any) -> jax.Array:
        result = RULES[name](params, *arrays)
        if result is NEEDS_DENSE:
            raise _UnfitError
        return result

    try:
        return run_with_auto_axes(compute, arrays, eqn.outvars[0].aval.sharding)
    except _UnfitError:
        return NEEDS_DENSE


def _typed(eqn: Any) -> dict[str, Any]:
    """The parameters of a product, with the dtype that JAX gave to its result."""
    return eqn.params | {"preferred_element_type": eqn.outvars[0].aval.dtype}


class _UnfitError(Exception):
    """Carries NEEDS_DENSE out of a JAX transformation."""


def _schedule(jaxpr: Any) -> tuple[list, list[list]]:
    """The equations that outputs or effects depend on, and what may be dropped after each."""
    alive = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    eqns, freed = [], []
    for eqn in reversed(jaxpr.eqns):
        if not eqn.effects and alive.isdisjoint(eqn.outvars):
            continue
        inputs = dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal))
        unused = [v for v in eqn.outvars if v not in alive]
        eqns.append(eqn)
        freed.append([v for v in inputs if v not in alive] + unused)
        alive.update(inputs)
    return eqns[::-1], freed[::-1]


def _setting(scheduled: tuple[Any, list]) -> Mapping | tuple:
    """What distinguishes the settings under which an equation was traced."""
    eqn = scheduled[0]
    return (id(getattr(eqn, "ctx", None)), id(eqn.source_info.name_stack))


@contextlib.contextmanager
def _context(eqn: Any) -> Any:
    """The settings that an equation was traced under: mesh, compute type, named scopes."""
    scope = str(eqn.source_info.name_stack)
    with contextlib.ExitStack() as stack:
        if hasattr(eqn, "ctx"):
            stack.enter_context(eqn.ctx.manager)
        if scope:
            stack.enter_context(jax.named_scope(scope))
        yield
