"""Optimiser state as packed lookup-table codes: 8-bit Adam and lower, around any transformation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int32, Key

from lutjax.arrays import MatrixView
from lutjax.codebooks import dithered_codes, nearest_codes
from lutjax.optim._explicit import init_with_auto_axes, update_with_auto_axes
from lutjax.optim._state import (
    CodedMoment,
    find_moments,
    is_coded,
    leaf_paths,
    needs_precision,
)
from lutjax.packing import BLOCK, pack
from lutjax.paths import boxed


class QuantizedState(NamedTuple):
    """State of :func:`quantized_state`.

    Attributes:
      inner_state: State of the inner transformation; large arrays are in codes.
      count: Updates so far.
    """

    inner_state: Any
    count: Int32[Array, ""]  # type: ignore[assignment]


def dynamic_map(bits: int, *, signed: bool) -> np.ndarray:
    """Dynamic-exponent table: `10^-e` times an evenly spaced fraction, with more of both near 1.

    Exponent `e` has twice the fractions of exponent `e + 1`, so that the relative error stays about
    the same over `bits - 1` decades. Zero and one are exact.

    Args:
      bits: 3 to 8.
      signed: Whether half of the values are negative.

    Returns:
      ``float32[2**bits]``, ascending.

    Source: 8-bit optimizers (arXiv 2110.02861, section 1.3).

    >>> [f"{value:.4f}" for value in dynamic_map(3, signed=False)[:4]]
    ['0.0000', '0.0325', '0.0775', '0.2125']
    """
    if not 3 <= bits <= 8:
        raise ValueError(f"bits={bits} of a dynamic map must be 3 to 8")
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        magnitudes = 10.0 ** (i - (bits - 2)) * (edges[1:] + edges[:-1]) / 2
        values += [*magnitudes, *(-magnitudes if signed else [])]
    return np.sort(np.asarray(values, np.float32))


def moment_table(bits: int, order: Literal[1, 2]) -> np.ndarray:
    """The table for first moments (signed) and for second moments (not negative).

    Dynamic maps, except for second moments in 4 bits: each of their values is 1.8 times the one
    before, down to 1.5e-4. Evenly spaced ones (arXiv 2309.01507, section 4) go down to 1/16 only,
    and weights with smaller gradients than the largest of their block would hardly be trained.
    Tables of second moments have no zero, since what is divided by must not become zero (ibid.):
    the one of the dynamic map is replaced by half the value after it.
    """
    if order == 2 and bits < 8:
        return (1.8 ** np.arange(1 - 2**bits, 1.0)).astype(np.float32)
    table = dynamic_map(bits, signed=order == 1)
    if order == 2:
        table[0] = table[1] / 2
    return table


def _uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Numbers between 0 and 1: hashes of their places.

    `jax.random.uniform` would take longer than all the rest of encoding, on CPUs 15 times as long
    in 4 bits; rounding needs no better numbers than these (the last steps of MurmurHash3).
    """
    place, stride = jax.random.bits(key), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place + index * jnp.uint32(0x9E3779B9 * stride % 2**32)
        stride *= shape[axis]
    place = (place ^ (place >> 16)) * jnp.uint32(0x85EBCA6B)
    place = (place ^ (place >> 13)) * jnp.uint32(0xC2B2AE35)
    place = place ^ (place >> 16)
    return ((place >> 8).astype(jnp.float32) + 0.5) * np.float32(2**-24)


def _encode(
    x: Float[Array, "..."], table: np.ndarray, block: int, key: Key[Array, ""] | None = None
) -> CodedMoment:
    """Codes of `x` by blocks along its last axis but one, scaled by their largest entry.

    They are those of the nearest values or, given a key, of values that are right on average.
    """
    matrix = (x[:, None] if x.ndim == 1 else x).astype(jnp.float32)
    *batch, k, n = matrix.shape
    block = min(block, k)
    edge = [(0, 0)] * len(batch) + [(0, -k % block), (0, 0)]
    groups = jnp.pad(matrix, edge).reshape(*batch, -1, block, n)
    # The scale has the sign of the largest entry, which thus is exactly 1 in the table (there is no
    # -1). So what is decoded encodes to the same again, and unchanged state doesn't drift.
    largest = jnp.argmax(jnp.abs(groups), axis=-2, keepdims=True)
    scales = jnp.take_along_axis(groups, largest, axis=-2)[..., 0, :]
    values = groups / jnp.where(scales != 0, scales, 1)[..., None, :]
    values = values.reshape(*batch, -1, n)[..., :k, :]
    if key is None:
        codes = nearest_codes(values, table)
    else:
        codes = dithered_codes(values, table, _uniform(key, values.shape))
    bits = round(math.log2(table.size))
    return CodedMoment(
        words=pack(codes, bits),
        scales=scales,
        lut=jnp.broadcast_to(jnp.asarray(table)[None, :, None], (*batch, 1, table.size, 1)),
        offsets=None,
        group_size=block,
        padding=-k % BLOCK,
        dtype=np.dtype(x.dtype),
        view=MatrixView.of(x.shape[-2:], (0,)),
    )


def reencode(x: Float[Array, "..."], old: CodedMoment, order: Literal[1, 2]) -> CodedMoment:
    """A moment in as many bits, and blocks of the same size, as the one that it replaces."""
    return _encode(x, moment_table(old.bits, order), old.group_size)


def quantized_state(
    inner: optax.GradientTransformation,
    bits: Literal[4, 8] = 8,
    block: int = 256,
    *,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any gradient transformation in 8 or 4 bits a number.

    Every floating array of the state with at least `min_size` entries is a :class:`lutjax.LutArray`
    between steps: blocks along its last axis but one, scaled by their largest entry. One of which
    that axis is so short that scales would cost more than codes save stays as it is. So do copies
    of parameters, and gradients that accumulate: small changes add up in them; and the moments of
    centred RMSProp, whose difference must not be negative. Fields that hold
    second moments (``nu``, ``v``, ...) have tables without zero and negative values. A step decodes
    the state, runs `inner`, and encodes again.

    Moments are rounded up or down at random, such that they are right on average over steps. With
    the nearest value, one that changes by less than half the distance of two values in a step would
    stay where it is while the block's largest entry does. First moments in 4 bits have the nearest
    value all the same: they change by more, and with values that far apart, chance does more harm.

    A step has the decoded moments in memory, of all parameters at once if the compiler computes
    them side by side, as XLA does on CPUs.

    Around :func:`project` it also encodes the stored projections, ``quantized_state(galore(...))``;
    inside, ``project(quantized_state(...), map)``, it has a dual adapter form.

    Args:
      inner: Any optax transformation.
      bits: 8 or 4.
      block: Numbers that share a scale.
      min_size: Smaller arrays are left alone, as they cost little and matter much.

    Returns:
      A transformation whose state, :class:`QuantizedState`, has that of `inner` with large arrays
      compressed.

    Raises:
      ValueError: For other bits, or a block below 1.

    Source: 8-bit optimizers (arXiv 2110.02861); 4-bit states (arXiv 2309.01507).

    >>> optimizer = quantized_state(optax.scale_by_adam())
    >>> optimizer.init({"w": jnp.ones((256, 64))}).inner_state.mu["w"]
    CodedMoment(shape=(256, 64), float32, 8 bits, group_size=column, 17.7 kB)
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 8 or 4")
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    inner = optax.with_extra_args_support(inner)

    def is_worth_it(x: Array) -> bool:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        if not floating or x.ndim < 1 or x.size < max(1, min_size):
            return False
        encoded = jax.eval_shape(lambda: _encode(x, moment_table(bits, 1), block))
        return encoded.nbytes < x.size * x.dtype.itemsize

    def encode(state: Any, params: Any, is_encoded: list[bool], count: Array) -> QuantizedState:
        """`state` with codes for the leaves so marked; `params` may be gradients."""
        leaves, treedef = jax.tree.flatten(state)
        step_key = jax.random.fold_in(jax.random.key(0), count)
        for i, moment in enumerate(find_moments(state, leaf_paths(params))):
            if is_encoded[i]:
                order: Literal[1, 2] = 1 if moment is None else moment[0]
                at_random = moment is not None and (order == 2 or bits == 8)
                key = jax.random.fold_in(step_key, i) if at_random else None
                leaves[i] = _encode(leaves[i], moment_table(bits, order), block, key)
        return QuantizedState(jax.tree.unflatten(treedef, leaves), count)

    def start(params: Any) -> Any:
        state = inner.init(params)
        if any(map(is_coded, jax.tree.leaves(state, is_leaf=is_coded))):
            raise ValueError("the state has codes already; wrap an optimizer only once")
        exact = needs_precision(state, leaf_paths(params))
        worth = [is_worth_it(x) for x in jax.tree.leaves(state)]
        is_encoded = [w and not e for w, e in zip(worth, exact, strict=True)]
        state = encode(state, params, is_encoded, jnp.zeros((), jnp.int32))
        # In a box, nnx.Optimizer would take a moment for one array.
        return jax.tree.map(
            lambda x: boxed(x) if is_coded(boxed(x)) else x,
            state,
            is_leaf=lambda x: is_coded(boxed(x)),
        )

    def step(
        updates: Any, state: QuantizedState, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        dense = jax.tree.map(
            lambda x: x.materialize() if is_coded(x) else x, state.inner_state, is_leaf=is_coded
        )
        new_updates, dense = inner.update(updates, dense, params, **extra_args)
        is_encoded = [is_coded(x) for x in jax.tree.leaves(state.inner_state, is_leaf=is_coded)]
        return new_updates, encode(dense, updates, is_encoded, optax.safe_increment(state.count))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        return update_with_auto_axes(step, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(partial(init_with_auto_axes, start), update)
