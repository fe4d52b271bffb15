"""What a lifted function did with each compressed parameter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lutjax.arrays import CompressedArray, format_bytes

FUSED = "fused"
MATERIALIZED = "materialized"


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a compressed parameter by a primitive.

    Attributes:
      path: Path of the parameter among the arguments.
      primitive: Name of the JAX primitive that used it.
      outcome: ``"fused"`` or ``"materialized"``.
      nbytes: Bytes of the dense weight that had to be made; 0 if fused.
    """

    path: str
    primitive: str
    outcome: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class LiftReport:
    """Every use of every compressed parameter; prints as a table.

    Attributes:
      uses: In the order of the program; the body of a loop counts once.
      unused: Paths of compressed parameters that no computation touched.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...] = ()

    @property
    def fused(self) -> tuple[Use, ...]:
        """Uses that ran on the compressed form."""
        return tuple(use for use in self.uses if use.outcome == FUSED)

    @property
    def materialized(self) -> tuple[Use, ...]:
        """Uses for which the dense weight had to be made."""
        return tuple(use for use in self.uses if use.outcome == MATERIALIZED)

    def __str__(self) -> str:
        """A line for each parameter and primitive, and totals."""
        width = max([len(use.path) for use in self.uses] + [len("parameter")])
        lines = [f"{'parameter':<{width}}  {'primitive':<20}  outcome"]
        for use in self.uses:
            size = f" ({format_bytes(use.nbytes)})" if use.nbytes else ""
            lines.append(f"{use.path:<{width}}  {use.primitive:<20}  {use.outcome}{size}")
        lines += [f"{path:<{width}}  {'-':<20}  unused" for path in self.unused]
        lines.append(f"{len(self.fused)} uses fused, {len(self.materialized)} materialized")
        return "\n".join(lines)


class MaterializationError(TypeError):
    """A strict lift met a primitive that needs the dense weight."""


class MaterializationWarning(UserWarning):
    """A lift had to make a weight dense."""


class Recorder:
    """Collects uses while a function is lifted; the only state of a lift, gone when it returns.

    JAX may trace the body of a loop more than once; an equation's use of a path counts once.
    """

    def __init__(self, strict: bool):
        self.strict = strict
        self._uses: dict[tuple, tuple[Use, Any]] = {}

    @property
    def uses(self) -> tuple[Use, ...]:
        """In the order of the program."""
        return tuple(use for use, _ in self._uses.values())

    def _add(self, use: Use, eqn: Any) -> None:
        key = (use.path, use.primitive, id(eqn))
        self._uses.setdefault(key, (use, eqn))  # holding the equation keeps its id its own

    def fused(self, path: str, primitive: str, eqn: Any) -> None:
        """Notes a use on the compressed form."""
        self._add(Use(path, primitive, FUSED, 0), eqn)

    def materialized(self, path: str, primitive: str, array: CompressedArray, eqn: Any) -> None:
        """Notes that a weight had to be made dense.

        Raises:
          MaterializationError: If strict.
        """
        if self.strict:
            raise MaterializationError(
                f"{path!r} {array!r} is used by the primitive {primitive!r}, which needs the dense "
                f"weight; change that use, materialize the weight beforehand, or lift without "
                f"strict=True"
            )
        nbytes = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        self._add(Use(path, primitive, MATERIALIZED, nbytes), eqn)
