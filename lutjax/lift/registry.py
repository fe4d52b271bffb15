"""Where rules for primitives are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _NeedsDense:
    def __repr__(self) -> str:
        return "NEEDS_DENSE"


NEEDS_DENSE = _NeedsDense()
"""What a rule returns when it cannot work on the compressed form."""

PrimitiveRule = Callable[..., Any]

RULES: dict[str, PrimitiveRule] = {}
"""Rules by the name of the primitive: ``rule(params, *operands) -> result``.

At least one operand is compressed; the result is dense or compressed, a sequence of such for
primitives with several results, or :data:`NEEDS_DENSE`.
"""


def rule(*names: str) -> Callable[[PrimitiveRule], PrimitiveRule]:
    """Registers a rule for the primitives ``names``."""

    def register(fn: PrimitiveRule) -> PrimitiveRule:
        for name in names:
            RULES[name] = fn
        return fn

    return register
