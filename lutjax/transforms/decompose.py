"""Dense parameters to a quantised part plus a low-rank part."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from lutjax.arrays import (
    CompressedArray,
    LowRankArray,
    MatrixView,
    SumArray,
    is_compressed,
)
from lutjax.arrays.typed_shardings import compress_with_auto_axes
from lutjax.paths import path_key, path_string
from lutjax.progress import progress_bar
from lutjax.transforms.feedback import damped, factor
from lutjax.transforms.importance import (
    Importance,
    check_importance,
    error_weights,
    side_weights,
)
from lutjax.transforms.quantize import (
    check_finite,
    check_hessian,
    match_rules,
    quantize_array,
    weight_view,
)
from lutjax.transforms.recipe import LutConfig, Recipe, Rule
from lutjax.transforms.svd import SvdMethod, balanced, low_rank_factors

Method = Literal["lq", "loftq", "lorc", "svd", "lora"]

ROUNDS: dict[Method, int] = {"lq": 100, "loftq": 5, "lorc": 1, "svd": 1, "lora": 0}
"""Most rounds of each method; only those of ``lq`` and ``loftq`` can be set."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decomposition:
    """A decomposed weight and how it was reached.

    Attributes:
      array: ``SumArray(LutArray, LowRankArray)``, or with a rotated array of codes.
      error: ``float32[*batch]``, the Frobenius norm of ``sqrt(F) * (W - array)``, or with the
        Hessian ``H = L L.T`` that of ``L.T (W - array)``.
      history: ``float32[*batch, rounds]``, that norm after each round, NaN after the stop.
      rounds: ``int32[*batch]``, rounds run.
    """

    array: SumArray
    error: Float[Array, "*batch"]
    history: Float[Array, "*batch rounds"]
    rounds: Int32[Array, "*batch"]


def decompose(
    params: Any,
    recipe: Recipe,
    *,
    rank: int,
    method: Method = "lq",
    key: PRNGKeyArray,
    fisher: Mapping[str, Any] | None = None,
    hessians: Mapping[str, Any] | None = None,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> Any:
    r"""Replaces weight matrices by a quantised part plus a low-rank part, ``W = Q + L1 L2``.

    .. math:: \min_{Q, L_1, L_2} \| \sqrt{F} \circ (W - Q - L_1 L_2) \|_F

    With the second moments of its inputs, ``H = L L.T``, the error is that of products,
    ``|L.T (W - Q - L1 L2)|``, codes are rounded with error feedback (:func:`lutjax.quantize`), and
    the low-rank part is the best one for that error.

    The methods, with SVD the best rank-r approximation (of ``D_row A D_col``, the row and column
    means of F, or of ``L.T A``, if F or H is given):

    * ``"lq"``: ``L = SVD(W - Q)``, ``Q = quantize(W - L)`` from Q = 0 until the error rises, at
      most 100 rounds; the best round is kept, its low-rank part fitted once more. LQ-LoRA.
    * ``"loftq"``: ``Q = quantize(W - L)``, ``L = SVD(W - Q)`` from L = 0, five rounds. LoftQ.
    * ``"lorc"``: one such round: a low-rank correction of the quantisation error. LoRC.
    * ``"svd"``: ``L = SVD(W)``, then ``Q = quantize(W - L)``: the largest components stay
      unquantised. PiSSA.
    * ``"lora"``: ``Q = quantize(W)``, L1 random and L2 zero. QLoRA.

    Works under ``jit``. Each matrix of stacked layers is decomposed by itself.

    Args:
      params: A pytree of parameters.
      recipe: How to quantise which path; an allocation plan is one.
      rank: Inner size r of the low-rank part, 1 to min(K, N).
      method: One of the above.
      key: For the randomised decompositions and random factors. Each matrix uses its own key, made
        from this one and its path.
      fisher: For each path, F of the weight's shape or its ``(row means, column means)``, as
        :func:`lutjax.calibrate.fisher` gives.
      hessians: For each path ``float32[*batch, K, K]``, as :func:`lutjax.calibrate.hessians` gives;
        instead of ``fisher``.
      rounds: Most rounds of ``"lq"``, rounds of ``"loftq"``.
      svd: ``"randomized"`` (``r + 10`` columns, 2 power iterations) or ``"dense"``.
      allow_nonfinite: Do not look for NaN and infinity in the weights.
      progress: Show a progress bar over the matrices.

    Returns:
      A pytree like ``params`` with ``SumArray(LutArray, LowRankArray)`` where the recipe says so,
      the codes in a :class:`lutjax.arrays.RotatedArray` if it rotates; the factors have the dtype
      of the weight.

    Raises:
      ValueError: If a rule matches nothing, the rank does not fit, a weight, its Fisher
        information or its Hessian is not finite or missing; the message names the parameter path.
      TypeError: If a rule reaches a leaf that is no floating-point matrix.

    Source: LQ-LoRA (arXiv 2311.12023, section 3), LoftQ (arXiv 2310.08659), LoRC in ZeroQuant-V2
    (arXiv 2303.08302), PiSSA (arXiv 2404.02948); with second moments CALDERA (arXiv 2405.18886).

    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    >>> decompose(params, Recipe.uniform(bits=3), rank=4, key=jax.random.key(1))["kernel"]
    SumArray(LutArray(shape=(64, 32), float32, 3 bits, group_size=column, 864 B),
             LowRankArray(shape=(64, 32), float32, rank=4, 1.5 kB))
    """
    decomposed, _ = decompose_with_history(
        params,
        recipe,
        rank=rank,
        method=method,
        key=key,
        fisher=fisher,
        hessians=hessians,
        rounds=rounds,
        svd=svd,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
    )
    return decomposed


def decompose_with_history(
    params: Any,
    recipe: Recipe,
    *,
    rank: int,
    method: Method = "lq",
    key: PRNGKeyArray,
    fisher: Mapping[str, Any] | None = None,
    hessians: Mapping[str, Any] | None = None,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> tuple[Any, dict[str, Decomposition]]:
    """Like :func:`decompose`, and returns the :class:`Decomposition` of each path as well."""
    plan = match_rules(recipe, params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    named = [(path_string(path), leaf) for path, leaf in leaves]
    check_decomposition(
        {path: (leaf.shape, plan[path]) for path, leaf in named if path in plan},
        rank=rank,
        method=method,
        rounds=rounds,
        svd=svd,
        fisher=fisher,
        hessians=hessians,
    )
    results: dict[str, Decomposition] = {}
    done = []
    for path, leaf in progress_bar(named, "decompose", "leaf", show=progress):
        if path in plan:
            results[path] = decompose_array(
                leaf,
                plan[path],
                rank=rank,
                method=method,
                key=key,
                fisher=None if fisher is None else fisher[path],
                hessian=None if hessians is None else hessians[path],
                rounds=rounds,
                svd=svd,
                path=path,
                allow_nonfinite=allow_nonfinite,
            )
        done.append(results[path].array if path in plan else leaf)
    return jax.tree.unflatten(treedef, done), results


def check_decomposition(
    weights: Mapping[str, tuple[tuple[int, ...], Rule]],
    *,
    rank: int,
    method: str,
    rounds: int | None,
    svd: str,
    fisher: Mapping[str, Any] | None = None,
    hessians: Mapping[str, Any] | None = None,
) -> None:
    """Checks all that can be known before anything is computed.

    Args:
      weights: Logical shape and rule of each path.
      rank: As in :func:`decompose`.
      method: As in :func:`decompose`.
      rounds: As in :func:`decompose`.
      svd: As in :func:`decompose`.
      fisher: As in :func:`decompose`.
      hessians: As in :func:`decompose`.

    Raises:
      ValueError: Names what does not fit.
    """
    _check_arguments(method, rounds, svd)
    _check_one_weighting(fisher, hessians)
    for path, (shape, rule) in weights.items():
        batch_ndim, view = weight_view(shape, rule, path)
        check_rank(rank, *view.matrix_shape(shape[batch_ndim:]), path)
        check_calibrated("the Fisher information has", fisher, path)
        check_calibrated("hessians have", hessians, path)


def check_calibrated(what: str, found: Mapping[str, Any] | None, path: str) -> None:
    """Raises ValueError if a statistic that is given was not calibrated for ``path``."""
    if found is not None and path not in found:
        raise ValueError(
            f"{what} nothing for {path!r}; calibrate with the same recipe, or exclude that path "
            f"from the recipe (`hessians` leaves out what a recipe's `embeddings` are for)"
        )


def decompose_array(
    weight: Float[Array, "..."],
    rule: Rule,
    *,
    rank: int,
    method: Method = "lq",
    key: PRNGKeyArray,
    fisher: Any = None,
    hessian: Float[Array, "*batch k k"] | None = None,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    path: str = "kernel",
    allow_nonfinite: bool = False,
) -> Decomposition:
    """Decomposes one weight; ``path`` names it in errors and makes its key.

    See :func:`decompose` for the arguments.
    """
    _check_arguments(method, rounds, svd)
    _check_one_weighting(fisher, hessian)
    batch_ndim, view = weight_view(weight.shape, rule, path)
    check_rank(rank, *view.matrix_shape(weight.shape[batch_ndim:]), path)
    if not allow_nonfinite:
        check_finite(weight, path)
    if fisher is not None:
        fisher = check_importance(fisher, weight.shape, batch_ndim, view, path)
    if hessian is not None:
        hessian = check_hessian(hessian, weight.shape, batch_ndim, view, path)
    assert rule.config is not None
    compress = functools.partial(
        _decompose,
        config=rule.config,
        rank=rank,
        method=method,
        rounds=ROUNDS[method] if rounds is None else rounds,
        svd=svd,
        batch_ndim=batch_ndim,
        view=view,
    )
    return compress_with_auto_axes(
        compress, path, jnp.asarray(weight), path_key(key, path), fisher, hessian
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The two half-steps and the error of one matrix."""

    weight: Float[Array, "k n"]
    error: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    quantize: Callable[[jax.Array], CompressedArray]
    factorize: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

    @classmethod
    def of(
        cls,
        weight: jax.Array,
        fisher: Importance | None,
        hessian: jax.Array | None,
        config: LutConfig,
        rank: int,
        svd: SvdMethod,
    ) -> _Steps:
        rule = Rule("*", config, axis=-2)
        if hessian is not None:
            return cls._of_products(weight, hessian, rule, rank, svd)
        rows, columns = side_weights(fisher, *weight.shape)
        weights = error_weights(fisher)

        def error(dense, left, right):
            return jnp.linalg.norm(weights * (weight - dense - left @ right))

        def factorize(key, residual):
            scaled = residual * rows[:, None] * columns[None, :]
            left, right = low_rank_factors(key, scaled, rank, svd)
            return left / rows[:, None], right / columns[None, :]

        return cls(weight, error, lambda a: quantize_array(a, rule), factorize)

    def in_dtype(self, dtype: Any) -> _Steps:
        """With factors rounded to their dtype, so that the codes make up for it."""

        def factorize(key, residual):
            left, right = self.factorize(key, residual)
            return left.astype(dtype).astype(jnp.float32), right.astype(dtype).astype(jnp.float32)

        return dataclasses.replace(self, factorize=factorize)

    @classmethod
    def _of_products(
        cls, weight: jax.Array, hessian: jax.Array, rule: Rule, rank: int, svd: SvdMethod
    ) -> _Steps:
        lower = factor(damped(hessian))

        def seen(a):
            return jnp.matmul(lower.T, a, precision=jax.lax.Precision.HIGHEST)

        def error(dense, left, right):
            return jnp.linalg.norm(seen(weight - dense - left @ right))

        def factorize(key, residual):
            left, right = low_rank_factors(key, seen(residual), rank, svd)
            # Factors of one size, which an optimiser with steps of one size can train.
            return balanced(solve_triangular(lower, left, trans=1, lower=True), right)

        def rounded(a):
            return quantize_array(a, rule, hessian=hessian)

        return cls(weight, error, rounded, factorize)


@functools.partial(
    jax.jit, static_argnames=("config", "rank", "method", "rounds", "svd", "batch_ndim", "view")
)
def _decompose(
    weight: jax.Array,
    key: PRNGKeyArray,
    fisher: Importance | None,
    hessian: jax.Array | None,
    *,
    config: LutConfig,
    rank: int,
    method: Method,
    rounds: int,
    svd: SvdMethod,
    batch_ndim: int,
    view: MatrixView,
) -> Decomposition:
    matrix = view.to_matrix(weight, batch_ndim).astype(jnp.float32)
    run = {"lq": _lq, "svd": _svd_first, "lora": _zero}.get(method, _quantized_first)

    def one(arguments):
        key, matrix, fisher, hessian = arguments
        steps = _Steps.of(matrix, fisher, hessian, config, rank, svd).in_dtype(weight.dtype)
        quantized, left, right, error, history, count = run(steps, key, rank, rounds)
        low_rank = LowRankArray.of(left.astype(weight.dtype), right.astype(weight.dtype))
        array = SumArray.of(quantized.astype(weight.dtype), low_rank)
        return Decomposition(array, error, history, count)

    if batch_ndim:  # a scan: a while loop under vmap would run all layers to the slowest one's end
        batch = weight.shape[:batch_ndim]
        keys = jax.random.split(key, math.prod(batch))
        data = (matrix, fisher, hessian)
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[batch_ndim:]), data)
        mapped = jax.lax.map(one, (keys, *flat))
        result = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), mapped)
    else:
        result = one((key, matrix, fisher, hessian))
    return dataclasses.replace(result, array=result.array.with_view(view))


def _lq(steps: _Steps, key, rank, rounds):
    k, n = steps.weight.shape
    keys = jax.random.split(key, rounds + 1)

    def unfinished(state):
        _, _, count, stop = state
        return (count <= rounds) & ~stop

    def body(state):
        best, history, count, _ = state
        before, best_left, best_right, best_error = best
        dense = before.materialize_matrix()
        left, right = steps.factorize(keys[count], steps.weight - dense)
        # Fitted to the codes so far, these factors are the best ones to stop with.
        refit = steps.error(dense, left, right)
        quantized = steps.quantize(steps.weight - left @ right)
        error = steps.error(quantized.materialize_matrix(), left, right)
        stop = (count == rounds) | ~(error <= best_error)  # also at NaN
        keep = stop & ~(refit < best_error)
        new = (
            _where(stop, before, quantized),
            jnp.where(keep, best_left, left),
            jnp.where(keep, best_right, right),
            jnp.where(stop, jnp.where(keep, best_error, refit), error),
        )
        history = history.at[count].set(error, mode="drop")
        return new, history, count + 1, stop

    start = (
        (
            _nothing(steps),
            jnp.zeros((k, rank), jnp.float32),
            jnp.zeros((rank, n), jnp.float32),
            jnp.float32(jnp.inf),
        ),
        jnp.full(rounds, jnp.nan, jnp.float32),
        jnp.int32(0),
        jnp.bool_(False),
    )
    best, history, count, _ = jax.lax.while_loop(unfinished, body, start)
    return (*best, history, jnp.minimum(count, rounds))


def _quantized_first(steps: _Steps, key, rank, rounds):
    def body(state, key):
        _, left, right = state
        quantized = steps.quantize(steps.weight - left @ right)
        dense = quantized.materialize_matrix()
        left, right = steps.factorize(key, steps.weight - dense)
        return (quantized, left, right), steps.error(dense, left, right)

    k, n = steps.weight.shape
    start = (_nothing(steps), jnp.zeros((k, rank), jnp.float32), jnp.zeros((rank, n), jnp.float32))
    last, errors = jax.lax.scan(body, start, jax.random.split(key, rounds))
    return (*last, errors[-1], errors, jnp.int32(rounds))


def _nothing(steps: _Steps) -> CompressedArray:
    """Codes that stand for zeros: with scales of zero, whatever the table."""
    abstract = jax.eval_shape(steps.quantize, steps.weight)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), a, b)


def _svd_first(steps: _Steps, key, rank, rounds):
    left, right = steps.factorize(key, steps.weight)
    quantized = steps.quantize(steps.weight - left @ right)
    error = steps.error(quantized.materialize_matrix(), left, right)
    return quantized, left, right, error, error[None], jnp.int32(1)


def _zero(steps: _Steps, key, rank, rounds):
    k, n = steps.weight.shape
    quantized = steps.quantize(steps.weight)
    left = jax.random.normal(key, (k, rank), jnp.float32) / math.sqrt(k)
    right = jnp.zeros((rank, n), jnp.float32)
    error = steps.error(quantized.materialize_matrix(), left, right)
    return quantized, left, right, error, jnp.zeros(0, jnp.float32), jnp.int32(0)


def _check_arguments(method: str, rounds: int | None, svd: str) -> None:
    if method not in ROUNDS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(ROUNDS)}")
    if svd not in get_args(SvdMethod):
        raise ValueError(f"svd={svd!r} is unknown; use 'randomized' or 'dense'")
    if rounds is None:
        return
    if method not in ("lq", "loftq"):
        raise ValueError(f"rounds={rounds} has no meaning for method={method!r}; leave it out")
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")


def _check_one_weighting(fisher: Any, hessian: Any) -> None:
    if fisher is not None and hessian is not None:
        raise ValueError("errors count by Fisher information or by Hessians; give one of them")


def check_rank(rank: int, k: int, n: int, path: str) -> None:
    """Raises ValueError, naming ``path``, if a ``K x N`` matrix cannot have so many dimensions."""
    if not isinstance(rank, (int, np.integer)) or not 1 <= rank <= min(k, n):
        raise ValueError(
            f"rank={rank!r} does not fit {path!r} with K={k} and N={n}; use 1 to {min(k, n)}"
        )
