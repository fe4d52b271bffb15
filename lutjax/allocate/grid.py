"""Candidate configurations: which there are, what they take, and which are worth trying."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from lutjax import codebooks
from lutjax.allocate.solvers import pareto
from lutjax.arrays import DoubleQuant
from lutjax.transforms.recipe import COLUMN, DEFAULT, LutConfig

_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def candidate_grid(
    bits: Sequence[int] = (2, 3, 4, 8),
    scale_bits: Sequence[int] = (2, 3, 4, 8),
    step_dtypes: Sequence[str] = ("bfloat16", "float16", "float32"),
    group_sizes: Sequence[int] = (16, 32, 64),
    blocks: Sequence[int] = (16, 64, 256),
    codebook: str = DEFAULT,
) -> tuple[LutConfig, ...]:
    """Every combination of code bits, scale bits, step dtype, group size and block.

    The defaults are the 432 configurations of LQ-LoRA (arXiv 2311.12023, section 3.2), of 184
    distinct sizes between 2.03 and 8.63 bits a weight, but with integers at 8 bits, as in
    :class:`lutjax.LutConfig`; the paper's are ``codebook="nf"``.

    >>> len(candidate_grid()), len({nominal_bits(c) for c in candidate_grid()})
    (432, 184)
    """
    combinations = itertools.product(bits, scale_bits, step_dtypes, group_sizes, blocks)
    return tuple(
        LutConfig(b, group, codebook, double_quant=DoubleQuant(b0, block, dtype))
        for b, b0, dtype, group, block in combinations
    )


def higgs_grid(
    bits: Sequence[float] = (2, 2.5, 3, 3.5, 4, 5, 6, 8), group_sizes: Sequence[int] = (512,)
) -> tuple[LutConfig, ...]:
    """The configurations of :meth:`lutjax.LutConfig.higgs` for some bits a weight.

    Those that the Hopper kernels take have 2, 3, 4 or 8 bits.

    Source: HIGGS (arXiv 2411.17525, section 5).

    >>> [nominal_bits(config) for config in higgs_grid((2, 4))]
    [2.03125, 4.03125]
    """
    return tuple(LutConfig.higgs(b, group) for group in group_sizes for b in bits)


def nominal_bits(config: LutConfig) -> float:
    """Bits a weight of a large matrix, ``b + b0 / B0 + b1 / (B0 B1)``, without its table.

    >>> nominal_bits(LutConfig(3, 64, double_quant=DoubleQuant(8, 256, "float32")))
    3.126953125
    """
    bits = config.bits / config.vector_size
    if config.group_size == COLUMN:
        return bits
    group = int(config.group_size)
    if config.double_quant is None:
        return bits + 8 * _scales_of_group(config) * _ITEMSIZE[config.scale_dtype] / group
    second = config.double_quant
    step = 8 * _ITEMSIZE[second.dtype] / second.block
    return bits + _scales_of_group(config) * (second.bits + step) / group


def _scales_of_group(config: LutConfig) -> int:
    """1, or 2 with an offset."""
    return 2 if config.scaling == "range" else 1


def stored_bytes(k: int, n: int, config: LutConfig) -> int:
    """Bytes that a quantised ``[K, N]`` matrix takes: codes, scales, table, paddings.

    The same number as ``nbytes`` of the quantised array, without making one.

    >>> stored_bytes(64, 64, LutConfig(4, 32))
    2368
    """
    group = k if config.group_size == COLUMN else int(config.group_size)
    groups = -(-k // group)
    p = config.vector_size
    total = -(-k // (8 * p)) * config.bits * n + 4 * p * 2**config.bits
    if config.double_quant is None:
        return total + _scales_of_group(config) * groups * n * _ITEMSIZE[config.scale_dtype]
    second = config.double_quant
    codes = -(-groups // 8) * second.bits * n
    steps = groups * -(-n // second.block) * _ITEMSIZE[second.dtype]
    return total + _scales_of_group(config) * (codes + steps + 4)


def fits(k: int, config: LutConfig) -> bool:
    """Whether a matrix with K rows can have this configuration.

    >>> fits(32, LutConfig(4, 64))
    False
    """
    return config.group_size == COLUMN or int(config.group_size) <= k


def gaussian_error(config: LutConfig, k: int = 4096) -> float:
    """Relative mean squared error of quantising independent normal weights, by simulation.

    A stand-in for measured costs where only shapes are known, and a first sieve of candidates; for
    rotated weights, which are nearly normal, it is their error.

    Args:
      config: The configuration.
      k: Rows of the matrix, for configurations with one scale a column.

    >>> 0.03 < gaussian_error(LutConfig(3, 64)) < 0.05
    True
    """
    if config.scaling == "rms":  # known without, for groups that are not tiny
        return codebooks.gaussian_error(config.bits, config.vector_size)
    return _simulated_error(config, k if config.group_size == COLUMN else int(config.group_size))


@functools.lru_cache(maxsize=1024)
def _simulated_error(config: LutConfig, group: int) -> float:
    table = config.table()
    if table is None or config.scaling == "range":
        raise ValueError(f"codebook {config.codebook!r} is not supported; use one with a sign")
    block = 1 if config.double_quant is None else min(config.double_quant.block, 256)
    shape = (-(-192 // group), group, -(-256 // block) * block)
    groups = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    scales = np.abs(groups).max(axis=1)
    if config.double_quant is not None:
        second = config.double_quant
        top = 2**second.bits - 1
        above = scales - scales.min()
        steps = above.reshape(len(above), -1, block).max(axis=-1) / top
        steps = np.repeat(steps, block, axis=-1)
        scales = scales.min() + np.round(above / np.where(steps > 0, steps, 1)) * steps
    values = np.sort(table)
    units = groups / np.where(scales > 0, scales, 1)[:, None, :]
    codes = np.searchsorted((values[1:] + values[:-1]) / 2, units)
    error = values[codes] * scales[:, None, :] - groups
    return float((error**2).sum() / (groups**2).sum())


def prune(
    candidates: Sequence[LutConfig], *, most: int | None = None, bits: tuple[float, float] = (0, 9)
) -> tuple[LutConfig, ...]:
    """The candidates that no other beats in both size and error on normal weights.

    Args:
      candidates: Configurations, for example :func:`candidate_grid`.
      most: Keep at most so many. The next one to be dropped is the one whose neighbours, mixed to
        its size as plans of many matrices mix them, err least compared with it. The smallest and
        the largest always stay.
      bits: Keep only those between these bits a weight.

    Returns:
      The remaining ones, smallest first.

    Raises:
      ValueError: If ``most`` is below 2 or nothing remains.

    >>> [round(nominal_bits(c), 2) for c in prune(candidate_grid(), most=4, bits=(2, 4.5))]
    [2.03, 3.04, 4.05, 4.31]
    """
    if most is not None and most < 2:
        raise ValueError(f"most={most} must be at least 2")
    inside = [c for c in candidates if bits[0] <= nominal_bits(c) <= bits[1]]
    if not inside:
        raise ValueError(f"no candidate has between {bits[0]} and {bits[1]} bits a weight")
    sizes = np.array([nominal_bits(c) for c in inside])
    front = [inside[j] for j in pareto(sizes, np.array([gaussian_error(c) for c in inside]))]
    while most is not None and len(front) > most:
        size = np.array([nominal_bits(c) for c in front])
        error = np.array([gaussian_error(c) for c in front])
        share = (size[2:] - size[1:-1]) / (size[2:] - size[:-2])  # of the smaller neighbour
        mixed = share * error[:-2] + (1 - share) * error[2:]
        del front[1 + int(np.argmin(mixed / error[1:-1]))]
    return tuple(front)
