"""Group scales, or offsets, that are themselves quantised, in two levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.layout import BLOCK, unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedScales:
    """Scales ``[..., Kg, N]`` as small integers: ``scale = floor + (code - zero) * step``.

    Neighbouring scales share a step: those of a block of group rows and columns. The codes are
    packed as those of weights are, so kernels read them in the same way. Storage for a group of B0
    weights: ``b0 / B0 + b1 / (B0 * B1)`` bits a weight beside the codes, b0 the bits of a scale's
    code, B1 the scales of a block and b1 the bits of a step.

    Attributes:
      words: ``uint8[..., ceil(Kg / 8), b0, N]``, see :mod:`pallas_kernels.layout`.
      steps: ``[..., ceil(Kg / rows), ceil(N / columns)]`` in bfloat16, float16 or float32.
      floor: ``float32[..., 1, 1]``, or None for zero.
      padding: Codes that pad Kg to a multiple of eight.
      block: Group rows and columns that share a step.
      zero: The code that stands for ``floor``.

    Sources: LQ-LoRA (arXiv 2311.12023, section 3.1), after QLoRA (arXiv 2305.14314, section 3), has
    a floor and blocks of columns; the K types of GGUF have blocks of rows and codes with a sign.

    >>> words = jnp.array([0b11_10_01_00, 0], jnp.uint8).reshape(1, 2, 1)
    >>> steps = jnp.array([[0.5], [2.0]])
    >>> scales = QuantizedScales(words, steps, None, padding=4, block=(2, 1), zero=1)
    >>> scales.expand()[:, 0].tolist()
    [-0.5, 0.0, 2.0, 4.0]
    """

    words: UInt8[Array, "..."]
    steps: Float[Array, "..."]
    floor: Float[Array, "..."] | None
    padding: int = dataclasses.field(metadata={"static": True})
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    zero: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scales that these stand for, ``[..., Kg, N]``."""
        *batch, blocks, _, n = self.words.shape
        return (*batch, BLOCK * blocks - self.padding, n)

    @property
    def ndim(self) -> int:
        """Axes of the scales that these stand for."""
        return self.words.ndim - 1

    @property
    def dtype(self) -> Any:
        """That of :meth:`expand`: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def bits(self) -> int:
        """Bits b0 of a scale's code."""
        return self.words.shape[-2]

    def check(self) -> None:
        """Raises ValueError unless the steps fit the codes, as those of a shard need not."""
        groups, n = self.shape[-2:]
        rows, columns = self.block
        if self.steps.shape[-2:] != (-(-groups // rows), -(-n // columns)):
            raise ValueError(
                f"quantised scales {self.shape} with blocks of {rows} x {columns} have steps "
                f"{self.steps.shape}; inside shard_map, shards must be whole blocks"
            )

    @jax.jit  # without temporary arrays of every step
    def expand(self) -> Float[Array, "..."]:
        """The scales as ``float32[..., Kg, N]``."""
        self.check()
        groups, n = self.shape[-2:]
        rows, columns = self.block
        steps = jnp.repeat(self.steps.astype(jnp.float32), rows, axis=-2)[..., :groups, :]
        steps = jnp.repeat(steps, columns, axis=-1)[..., :n]
        scales = (unpack(self.words, groups).astype(jnp.float32) - self.zero) * steps
        return scales if self.floor is None else self.floor + scales

    def columns(self, take: Callable[[jax.Array], jax.Array]) -> QuantizedScales:
        """Some of the columns, which ``take`` picks along the last axis of an array."""
        steps, (rows, columns) = self.steps, self.block
        if columns > 1:
            steps = jnp.repeat(steps, columns, axis=-1)[..., : self.shape[-1]]
        return dataclasses.replace(self, words=take(self.words), steps=take(steps), block=(rows, 1))


def some_columns(scales: Any, take: Callable[[jax.Array], jax.Array]) -> Any:
    """Scales or offsets of the columns that ``take`` picks along the last axis; None stays None."""
    if isinstance(scales, QuantizedScales):
        return scales.columns(take)
    return None if scales is None else take(scales)


def expanded(tree: Any) -> Any:
    """A pytree, such as scales and offsets, with plain arrays for quantised scales."""
    return jax.tree.map(
        lambda a: a.expand() if isinstance(a, QuantizedScales) else a,
        tree,
        is_leaf=lambda a: isinstance(a, QuantizedScales),
    )
