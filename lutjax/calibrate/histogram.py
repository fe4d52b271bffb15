"""A mergeable histogram of magnitudes with a bounded relative error of its quantiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int64

_BITS = 6  # mantissa bits: 64 bins an octave
_LOW, _HIGH = -40, 24  # octaves
BINS = (_HIGH - _LOW) << _BITS
SLOTS = BINS + 2
"""Bins, then what is below ``2**-40`` (zeros above all), then what is not finite."""

RELATIVE_ERROR = 2.0**-_BITS
"""No quantile between 2**-40 and 2**24 is off by more than this, relatively: a bin's width."""

_EDGES = np.append(
    np.ldexp(
        1 + np.tile(np.arange(1 << _BITS) / (1 << _BITS), _HIGH - _LOW),
        np.repeat(np.arange(_LOW, _HIGH), 1 << _BITS),
    ),
    2.0**_HIGH,
)


def magnitude_counts(x: Float[Array, "..."]) -> Float[Array, " slots"]:
    """How many of ``|x|`` fall into each slot, ``float32[SLOTS]``.

    >>> counts = magnitude_counts(jnp.array([0.0, 1.0, -1.0, jnp.nan]))
    >>> counts[BINS].item(), counts.max().item(), counts[-1].item()
    (1.0, 2.0, 1.0)
    """
    values = jnp.abs(x.reshape(-1)).astype(jnp.float32)
    # The exponent and the leading mantissa bits of a positive float, read as an integer, count
    # bins of equal relative width.
    bits = jax.lax.bitcast_convert_type(values, jnp.int32) >> np.int32(23 - _BITS)
    slot = jnp.clip(bits - np.int32((127 + _LOW) << _BITS), -1, BINS - 1)
    slot = jnp.where(slot < 0, BINS, slot)
    slot = jnp.where(jnp.isfinite(values), slot, BINS + 1)
    return jnp.zeros(SLOTS, jnp.int32).at[slot].add(1).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class MagnitudeHistogram:
    """Counts of magnitudes; two add up to that of both data sets.

    Attributes:
      counts: ``int64[*batch, BINS + 1]``, the last for zeros and what is below ``2**-40``.
    """

    counts: Int64[np.ndarray, "*batch slots"]

    @classmethod
    def of(cls, x: Float[Array, "..."]) -> MagnitudeHistogram:
        """The histogram of one array, which must be finite."""
        return cls(np.rint(np.asarray(magnitude_counts(x))[:-1]).astype(np.int64))

    @property
    def total(self) -> Int64[np.ndarray, "*batch"]:
        """How many values were counted."""
        return self.counts.sum(axis=-1)

    def __add__(self, other: MagnitudeHistogram) -> MagnitudeHistogram:
        """The histogram of both data sets."""
        return MagnitudeHistogram(self.counts + other.counts)

    def quantile(self, p: float | np.ndarray) -> np.ndarray:
        """The value that a share ``p`` of the magnitudes does not exceed, ``[*batch]``.

        Interpolated within a bin; off by at most ``RELATIVE_ERROR`` of itself, and 0 where the
        share is reached by zeros, or nothing was counted for a batch entry (an expert, perhaps).

        Args:
          p: In [0, 1]; a number, or one for each batch entry.

        Raises:
          ValueError: If p is outside, or nothing was counted.

        >>> MagnitudeHistogram.of(jnp.arange(1000.0)).quantile(0.5).round(1).item()
        500.0
        """
        p = np.broadcast_to(np.asarray(p, np.float64), self.counts.shape[:-1])
        if not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"p={p} is outside [0, 1]")
        if not self.total.any():
            raise ValueError("the histogram is empty")
        flat = self.counts.reshape(-1, self.counts.shape[-1])
        pairs = zip(flat, p.reshape(-1), strict=True)
        return np.array([_quantile(c, q) for c, q in pairs]).reshape(p.shape)

    def threshold(self, share: float | np.ndarray) -> np.ndarray:
        """What ignores a share of the magnitudes: their quantile, ``[*batch]``.

        Exactly 0 for a share of 0, where zeros that were counted would otherwise be ignored.

        Raises:
          ValueError: As :meth:`quantile`.
        """
        return np.where(np.asarray(share) > 0, self.quantile(share), 0.0)

    def share_below(self, value: float | np.ndarray) -> np.ndarray:
        """The share of magnitudes that do not exceed ``value``, ``[*batch]``; interpolated.

        0 for a batch entry for which nothing was counted.
        """
        value = np.broadcast_to(np.asarray(value, np.float64), self.counts.shape[:-1])
        flat = self.counts.reshape(-1, self.counts.shape[-1])
        pairs = zip(flat, value.reshape(-1), strict=True)
        return np.array([_share_below(c, v) for c, v in pairs]).reshape(value.shape)


def _cumulative(counts: np.ndarray) -> np.ndarray:
    """Counts up to each edge; zeros lie below the first."""
    return np.concatenate([counts[-1:], counts[-1] + np.cumsum(counts[:-1])]).astype(np.float64)


def _quantile(counts: np.ndarray, p: float) -> float:
    below = _cumulative(counts)
    wanted = p * below[-1]
    if wanted <= below[0]:
        return 0.0
    upper = int(np.searchsorted(below, wanted, side="left"))
    part = (wanted - below[upper - 1]) / (below[upper] - below[upper - 1])
    return float(_EDGES[upper - 1] + part * (_EDGES[upper] - _EDGES[upper - 1]))


def _share_below(counts: np.ndarray, value: float) -> float:
    below = _cumulative(counts)
    return float(np.interp(value, _EDGES, below) / max(below[-1], 1))
