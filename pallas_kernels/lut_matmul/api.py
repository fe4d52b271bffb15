"""``lut_matmul``: the product of activations with packed lookup-table weights."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.lut_matmul.checks import check_arguments
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.lut_matmul.gradients import parameter_gradients
from pallas_kernels.manual_axes import in_manual_axes, vary_over, varying_axes
from pallas_kernels.scales import QuantizedScales, expanded
from pallas_kernels.static_flags import flag, is_on

IMPLEMENTATIONS = LUT_MATMUL.implementations


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static arguments of one product."""

    k: int
    group_size: int
    transpose: bool
    implementation: str | None
    interpret: bool = False

    @property
    def static(self) -> dict:
        return {"k": self.k, "group_size": self.group_size, "transpose": self.transpose}

    @property
    def transposed(self) -> _Spec:
        """The spec of the backward product."""
        return dataclasses.replace(self, transpose=not self.transpose)


def lut_matmul(
    x: Float[Array, "*batch K"],
    words: UInt8[Array, "blocks bits N"],
    scales: Float[Array, "groups N"] | QuantizedScales,
    lut: Float[Array, "tables entries p"],
    offsets: Float[Array, "groups N"] | QuantizedScales | None = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    r"""Multiplies activations by a weight that is stored as packed table codes.

    .. math:: y_n = \sum_k x_k W_{kn}, \quad
              W_{kn} = lut[t, code[k / p, n], k \bmod p] \cdot scales[k / G, n] + offsets[k / G, n]

    Differentiable with respect to ``x``, ``scales``, ``offsets`` and ``lut``; gradients that are
    not asked for cost nothing. Leading axes of the weight are mapped with :func:`jax.vmap`.
    Sums are taken in float32 and the result has the dtype of ``x``.

    Args:
      x: ``[..., K]``, or ``[..., N]`` when transposed.
      words: Codes in the canonical layout of :mod:`pallas_kernels.layout`,
        ``[ceil(K / (8 p)), bits, N]``.
      scales: ``[ceil(K / G), N]``; the last group may be shorter. If they are quantised themselves,
        the kernels in C++ read them as they are; others get them expanded, in every call.
      lut: ``[T, 2**bits, p]``: one table (T = 1) or one per output channel (T = N); with p > 1 a
        code stands for p consecutive rows.
      offsets: Like ``scales``, or None.
      k: The number K of rows of the weight.
      group_size: The number G of consecutive rows that share a scale; K for one group a column.
      transpose: Multiplies by the transposed weight.
      implementation: One of ``IMPLEMENTATIONS``; None picks, while it is traced, the best one that
        supports the arguments on the platform that programs are compiled for here. To lower for an
        absent device, trace under a ``jax.sharding.AbstractMesh`` with its ``AbstractDevice``.

    Returns:
      ``[..., N]``, or ``[..., K]`` when transposed.

    Raises:
      ValueError: If shapes do not fit each other or the implementation is unknown.
      TypeError: If a dtype is wrong.
      NotImplementedError: If the named implementation cannot run these arguments here.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels.layout import pack
    >>> words = pack(jnp.array([[0, 1], [2, 3]]), bits=2)
    >>> lut = jnp.array([-1.0, -0.5, 0.5, 1.0]).reshape(1, 4, 1)
    >>> x, scales = jnp.ones((1, 2)), jnp.full((1, 2), 2.0)
    >>> lut_matmul(x, words, scales, lut, k=2, group_size=2).tolist()
    [[-1.0, 1.0]]

    The mechanism is that of FLUTE (arXiv 2407.10960).
    """
    LUT_MATMUL.check_name(implementation)
    interpret = LUT_MATMUL.interprets(implementation)
    spec = _Spec(k, group_size, transpose, implementation, interpret)
    check_arguments(x, words, scales, lut, offsets, **spec.static)
    LUT_MATMUL.check_runs_here(implementation, (x, words, scales, lut, offsets), spec.static)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    operands = (rows, words, scales, lut, offsets)
    axes = varying_axes(*jax.tree.leaves(operands))
    y = _product(spec, *jax.tree.map(lambda a: vary_over(a, axes), operands))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(spec: _Spec, *operands):
    # shard_map cannot differentiate a custom_vjp that takes symbolic zeros; there XLA has to drop
    # the gradients that nobody uses.
    return (_product_plain if in_manual_axes() else _product_lean)(spec, *operands)


def _batched_run(spec: _Spec, x, words, scales, lut, offsets):
    """The product with a batching rule: a batch of activations only is more rows of ``x``."""
    weight = (words, scales, lut) if offsets is None else (words, scales, lut, offsets)
    n = _columns(spec, words)

    @jax.custom_batching.custom_vmap
    def product(x, *weight):
        return _run(spec, x, *weight)

    @product.def_vmap
    def rule(axis_size, in_batched, x, *weight):
        if not any(jax.tree.leaves(in_batched[1:])):
            rows = x.reshape(-1, x.shape[-1])
            return product(rows, *weight).reshape(axis_size, -1, n), True
        axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
        return jax.vmap(functools.partial(_run, spec), in_axes=axes)(x, *weight), True

    return product(x, *weight)


def _fwd_plain(spec: _Spec, x, words, scales, lut, offsets):
    y = _product_plain(spec, x, words, scales, lut, offsets)  # which has derivatives of its own
    wanted = tuple(flag(a is not None) for a in (x, scales, lut, offsets))
    return y, (wanted, x, words, scales, lut, offsets)


def _fwd_lean(spec: _Spec, *operands):
    # The activations are kept only if a parameter learns.
    x, words, scales, lut, offsets = jax.tree.map(lambda a: a.value, operands)
    learning = [any(a.perturbed for a in jax.tree.leaves(operand)) for operand in operands]
    wanted = tuple(flag(learns) for i, learns in enumerate(learning) if i != 1)
    y = _product_lean(spec, x, words, scales, lut, offsets)
    kept = x if any(map(is_on, wanted[1:])) else jnp.zeros((0,), x.dtype)
    return y, (wanted, kept, words, scales, lut, offsets)


def _bwd(spec: _Spec, residuals, cotangent):
    wanted, x, words, scales, lut, offsets = residuals
    want_x, want_scales, want_lut, want_offsets = map(is_on, wanted)
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 5
    dx = None
    if want_x:
        back = spec.transposed
        arrays = (cotangent, words, scales, lut, offsets)
        name = spec.implementation  # if it cannot run backwards, any other may
        if name is not None and LUT_MATMUL.reason_against(name, arrays, back.static) is not None:
            back = dataclasses.replace(back, implementation=None, interpret=False)
        dx = _product(back, *arrays)
    dscales = dlut = doffsets = None
    if want_scales or want_lut or want_offsets:
        left, right = (cotangent, x) if spec.transpose else (x, cotangent)
        scales, back_to_scales = jax.vjp(expanded, scales)
        offsets, back_to_offsets = jax.vjp(expanded, offsets)
        dscales, dlut, doffsets = parameter_gradients(
            left,
            right,
            words,
            scales,
            lut,
            offsets,
            k=spec.k,
            group_size=spec.group_size,
            wanted=(want_scales, want_lut, want_offsets),
        )
        (dscales,) = (None,) if dscales is None else back_to_scales(dscales)
        (doffsets,) = (None,) if doffsets is None else back_to_offsets(doffsets)
    return dx, None, dscales, dlut, doffsets


_product_plain = jax.custom_vjp(_batched_run, nondiff_argnums=(0,))
_product_plain.defvjp(_fwd_plain, _bwd)
_product_lean = jax.custom_vjp(_batched_run, nondiff_argnums=(0,))
_product_lean.defvjp(_fwd_lean, _bwd, symbolic_zeros=True)


def _columns(spec: _Spec, words) -> int:
    return spec.k if spec.transpose else words.shape[-1]


@functools.partial(jax.jit, static_argnums=0)
def _run(spec: _Spec, x, words, scales, lut, offsets=None):
    """Runs one implementation, or the best one on the platform that is compiled for here."""
    if x.shape[0] == 0 or words.shape[-1] == 0:
        return jnp.zeros((x.shape[0], _columns(spec, words)), x.dtype)
    static = spec.static | ({"interpret": True} if spec.interpret else {})
    return LUT_MATMUL.run(spec.implementation, (x, words, scales, lut, offsets), static)
