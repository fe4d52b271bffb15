"""How much the matrices of a plan may take, in bits a weight or in bytes."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit, and what else is counted towards it.

    Attributes:
      bits_per_weight: The limit as bits for each counted weight; or
      nbytes: the limit in bytes. Exactly one of the two is given.
      fixed_bytes: Bytes that are counted besides the planned matrices: embeddings, adapters.
      fixed_weights: Weights that these stand for and that raise a limit in bits a weight.
        Adapters stand for none: they only take room.

    Raises:
      ValueError: If both or none of the limits are given, or a number is not positive.

    >>> Budget(bits_per_weight=2.5).limit(weights=400)
    125
    >>> Budget(nbytes=1000, fixed_bytes=100).limit(weights=400)
    900
    """

    bits_per_weight: float | None = None
    nbytes: int | None = None
    fixed_bytes: int = 0
    fixed_weights: int = 0

    def __post_init__(self):
        if (self.bits_per_weight is None) == (self.nbytes is None):
            raise ValueError("give a budget either in bits a weight or in bytes")
        value = self.nbytes if self.bits_per_weight is None else self.bits_per_weight
        if value is None or not math.isfinite(value) or value <= 0:
            raise ValueError(f"budget {value} must be a positive number")
        if self.fixed_bytes < 0 or self.fixed_weights < 0:
            raise ValueError("fixed_bytes and fixed_weights must not be negative")

    def limit(self, weights: int) -> int:
        """Bytes that remain for planned matrices of so many weights together."""
        if self.nbytes is not None:
            return int(self.nbytes) - self.fixed_bytes
        assert self.bits_per_weight is not None
        counted = weights + self.fixed_weights
        return math.floor(self.bits_per_weight * counted / 8) - self.fixed_bytes

    def describe(self, nbytes: int, weights: int) -> str:
        """What the budget would have to be for matrices of ``nbytes``, rounded up, in its unit.

        >>> Budget(bits_per_weight=2.5).describe(nbytes=130, weights=400)
        '2.6000 bits a weight'
        """
        total = nbytes + self.fixed_bytes
        if self.nbytes is not None:
            return f"{total} bytes"
        bits = 8 * total / (weights + self.fixed_weights)
        return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:.4f} bits a weight"
