"""Dense parameters to lookup-table weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax import codebooks
from lutjax.arrays import (
    LutArray,
    MatrixView,
    RotatedArray,
    is_compressed,
    quantize_scales,
)
from lutjax.arrays.typed_shardings import compress_with_auto_axes
from lutjax.packing import BLOCK, pack
from lutjax.paths import map_named, named_leaves, near_misses
from lutjax.rotation import rotate
from lutjax.tracing import concrete
from lutjax.transforms.feedback import DAMPING, round_with_feedback
from lutjax.transforms.recipe import (
    COLUMN,
    MIN_GROUP_SIZE,
    LutConfig,
    Recipe,
    Rule,
    check_recipe,
)
from pallas_kernels.scales import expanded


def quantize(
    params: Any,
    recipe: Recipe | None = None,
    *,
    hessians: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
    **uniform: Any,
) -> Any:
    """Replaces weight matrices by :class:`LutArray` codes, as a recipe says.

    Each group of G weights along the contraction axis is scaled by its absolute maximum (by its
    range, for affine tables; by its root mean square, for ``"gaussian"`` ones) and every weight
    becomes the code of the nearest table value. Weights that are rotated first become a
    :class:`lutjax.arrays.RotatedArray` of such codes.

    With the second moments of its inputs, a weight is rounded such that products err little instead
    of entries: scales are chosen from several multiples of the above, and rows make up for each
    other's errors (GPTQ). :func:`lutjax.calibrate.quantize_decoder` does this for a whole model.

    Works under ``jit`` and ``jax.eval_shape``. Matrices are handled one after the other, so the
    peak memory is the result plus a few times the largest matrix.

    Args:
      params: A pytree of parameters, or a single weight ``[..., K, N]``.
      recipe: What to do with which path; by default ``Recipe.uniform(**uniform)``.
      hessians: For some of the paths (``"array"`` for a single weight) the second moments of what
        enters the weight, ``float32[*batch, K, K]``, see :func:`lutjax.calibrate.hessians`.
      allow_nonfinite: Do not look for NaN and infinity in the weights.
      **uniform: Arguments of :meth:`Recipe.uniform`, if no recipe is given.

    Returns:
      A pytree like ``params``, compressed where the recipe says so.

    Raises:
      ValueError: If a rule matches nothing, a group is larger than K, a weight or Hessian is not
        finite, or a Hessian does not fit; the message names the parameter path.
      TypeError: If a rule reaches a leaf that is no floating-point matrix, or is compressed.

    Source: FLUTE (arXiv 2407.10960), QLoRA (arXiv 2305.14314, section 2), HIGGS (arXiv 2411.17525),
    GPTQ (arXiv 2210.17323).

    >>> params = {"mlp": {"kernel": jnp.ones((128, 32)), "bias": jnp.zeros(32)}}
    >>> quantize(params, Recipe.uniform(bits=3, group_size=32))["mlp"]["kernel"]
    LutArray(shape=(128, 32), float32, 3 bits, group_size=32, 1.8 kB)
    """
    if recipe is None:
        recipe = Recipe.uniform(**uniform)
    elif uniform:
        raise TypeError(f"give either a recipe or {', '.join(uniform)}, not both")
    check_recipe(recipe)
    hessians = {} if hessians is None else hessians
    if is_compressed(params) or jax.tree_util.all_leaves([params]):
        _check_hessian_paths(hessians, ["array"])
        rule = recipe.rule_for("array")
        if recipe.embeddings is not None:
            raise ValueError("a single array is no embedding; leave out embedding_bits")
        if rule is None:
            raise ValueError("the recipe has no rule for a single array; use the pattern '*'")
        return quantize_array(
            params, rule, hessian=hessians.get("array"), allow_nonfinite=allow_nonfinite
        )
    plan = match_rules(recipe, params)
    _check_hessian_paths(hessians, (path for path, _ in named_leaves(params)))

    def convert(path, leaf):
        if path not in plan:
            return leaf
        return quantize_array(
            leaf, plan[path], path=path, hessian=hessians.get(path), allow_nonfinite=allow_nonfinite
        )

    return map_named(convert, params)


def match_rules(recipe: Recipe, params: Any, kept: Iterable[str] = ()) -> dict[str, Rule]:
    """Which rule applies to which path of ``params``, checked before anything is computed.

    Paths that stay dense are left out, and no rule is about those that are ``kept``, but it may be
    for them only. Of the paths that a glob matches, those that are no
    floating-point matrix stay dense; one that is named in full must be a matrix.

    Raises:
      ValueError: If a rule matches nothing, or a configuration does not fit a weight.
      TypeError: If ``recipe`` is none, a path that is named in full is not a floating-point matrix,
        or a weight is compressed already.
    """
    plan = {}
    for path, leaf, rule in leaves_with_rules(recipe, params, kept):
        problem = _not_a_matrix(leaf)
        if problem is None:
            plan[path] = rule
            check_fit(leaf.shape, rule, path)
        elif rule.pattern == path or is_compressed(leaf):
            raise TypeError(f"cannot quantize {path!r}: {problem}")
    return plan


def leaves_with_rules(
    recipe: Recipe, params: Any, kept: Iterable[str] = ()
) -> list[tuple[str, Any, Rule]]:
    """Path, leaf and rule of everything that a recipe, which is checked, has a configuration for.

    Raises:
      ValueError: If a rule matches nothing, nor any of the paths that are ``kept``.
      TypeError: If ``recipe`` is none.
    """
    check_recipe(recipe)
    leaves = named_leaves(params)
    recipe.check_matches([*(path for path, _ in leaves), *kept])
    ruled = [(path, leaf, recipe.rule_for(path)) for path, leaf in leaves]
    return [(path, leaf, r) for path, leaf, r in ruled if r is not None and r.config is not None]


def check_fit(shape: tuple[int, ...], rule: Rule, path: str) -> None:
    """Checks that a rule's configuration fits a weight of logical ``shape``.

    Raises:
      ValueError: If an axis does not exist or the group is larger than K.
    """
    assert rule.config is not None
    batch_ndim, view = weight_view(shape, rule, path)
    k, _ = view.matrix_shape(shape[batch_ndim:])
    if 0 in shape:
        raise ValueError(f"{path!r} of shape {shape} has no weights; leave it out of the recipe")
    if batch_ndim and rule.batch_ndim is None and rule.axis is None and k < MIN_GROUP_SIZE:
        # As it is read, each of many tiny matrices has a table; heads are what it will be.
        raise ValueError(
            f"{path!r} of shape {shape} would be stacked matrices of {k} rows; if these are heads, "
            f"say with axis= in a rule which axes are summed over (a Flax DenseGeneral to heads: "
            f"axis=-3, from heads: axis=(-3, -2)), else give batch_ndim={batch_ndim}; "
            f"Rule({path!r}, None) keeps it dense"
        )
    group_size = rule.config.group_size
    if isinstance(group_size, int) and group_size > k:
        raise ValueError(
            f"group_size={group_size} is larger than K={k} of {path!r} {shape}; use a smaller "
            f"group{'' if rule.config.rotate else f' or {COLUMN!r}'}, say with axis= in a rule "
            f"which axes are summed over, or keep it dense with Rule({path!r}, None)"
        )


def weight_view(shape: tuple[int, ...], rule: Rule, path: str) -> tuple[int, MatrixView]:
    """Number of batch axes, and the view, of a weight that a rule applies to.

    Raises:
      ValueError: If the rule's axes do not exist in ``shape``.
    """
    ndim = len(shape)
    axis = rule.axis
    if axis is None:
        axis = -1 if path.rsplit("/", 1)[-1] in ("weight", "embedding") else -2
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis={rule.axis} does not exist in {path!r} of shape {shape}")
    axes = tuple(a % ndim for a in axes)
    batch_ndim = rule.batch_ndim
    if batch_ndim is None:
        batch_ndim = max(min(min(axes), ndim - len(axes) - 1), 0)
    if not 0 <= batch_ndim <= min(axes) or batch_ndim + len(axes) >= ndim:
        raise ValueError(
            f"batch_ndim={batch_ndim} and axis={rule.axis} leave no matrix in {path!r} of shape "
            f"{shape}; give the contraction axes and the number of leading stacked axes"
        )
    inner = shape[batch_ndim:]
    return batch_ndim, MatrixView.of(inner, tuple(a - batch_ndim for a in axes))


def quantize_array(
    weight: Float[Array, "..."],
    rule: Rule,
    *,
    path: str = "array",
    hessian: Float[Array, "*batch k k"] | None = None,
    allow_nonfinite: bool = False,
) -> LutArray | RotatedArray:
    """Quantises one weight; ``path`` names it in errors, ``hessian`` is that of its inputs.

    Raises:
      ValueError: If the configuration or the Hessian does not fit, or one of them or the weight has
        NaN or infinity.
      TypeError: If it is not a floating-point matrix.
    """
    problem = _not_a_matrix(weight)
    if problem is not None:
        raise TypeError(f"cannot quantize {path!r}: {problem}")
    if rule.config is None:
        raise ValueError(f"the rule {rule.pattern!r} leaves {path!r} dense")
    check_fit(weight.shape, rule, path)
    if not allow_nonfinite:
        check_finite(weight, path)
    batch_ndim, view = weight_view(weight.shape, rule, path)
    if hessian is not None:
        hessian = check_hessian(hessian, weight.shape, batch_ndim, view, path)
    compress = functools.partial(_quantize, config=rule.config, batch_ndim=batch_ndim, view=view)
    array = compress_with_auto_axes(compress, path, jnp.asarray(weight), hessian)
    if not allow_nonfinite:
        _check_scales(array, weight, rule.config, path)
    return array


def check_finite(weight: Any, path: str) -> None:
    """Raises an error naming ``path`` if a weight, unless it is traced, has no finite values."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise TypeError(f"{path!r} is a shape without values; use jax.eval_shape for its result")
    values = concrete(weight)
    if values is None:
        return
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ValueError(
            f"{path!r} has {bad} NaN or infinite values; mend the checkpoint, or pass "
            f"allow_nonfinite=True to quantize it as it is"
        )


def check_hessian(
    hessian: Any, shape: tuple[int, ...], batch_ndim: int, view: MatrixView, path: str
) -> Float[Array, "*batch k k"]:
    """The second moments of what enters a weight of logical ``shape``, in float32.

    Raises:
      ValueError: If they are of another shape, have NaN or infinity, or are no second moments.
    """
    k, _ = view.matrix_shape(shape[batch_ndim:])
    expected = (*shape[:batch_ndim], k, k)
    if hessian.shape != expected:
        raise ValueError(
            f"the Hessian of {path!r} has the shape {hessian.shape}; its weight {shape} needs "
            f"{expected}"
        )
    values = concrete(hessian)
    if values is not None and not np.isfinite(values).all():
        raise ValueError(
            f"the Hessian of {path!r} has NaN or infinite values; calibrate again without the "
            f"batch that makes them"
        )
    if values is not None and (np.diagonal(values, axis1=-2, axis2=-1) < 0).any():
        raise ValueError(
            f"the Hessian of {path!r} has negative numbers on its diagonal; it must be X.T @ X of "
            f"what enters the weight, see lutjax.calibrate.hessians"
        )
    return jnp.asarray(hessian, jnp.float32)


def _check_hessian_paths(hessians: Mapping[str, Any], paths: Iterable[str]) -> None:
    """Raises ValueError if there is a Hessian for a path that does not exist."""
    known = list(paths)
    for path in hessians:
        if path not in known:
            similar = ", ".join(near_misses(path, known))
            raise ValueError(
                f"there is a Hessian for {path!r}, but no such parameter; similar: {similar}"
            )


def fit_scales(
    matrix: Float[Array, "k n"], group_size: int, kind: Literal["absmax", "range", "rms"]
) -> tuple[Float[Array, "g n"], Float[Array, "g n"] | None]:
    """Scales, and offsets for affine tables, of groups of rows.

    Returns:
      ``(max |w|, None)``, ``(max w - min w, min w)`` or ``(sqrt(mean w**2), None)``, each
      ``float32[ceil(K/G), N]``; a group with NaN has a scale of NaN.
    """
    k, n = matrix.shape
    edge = [(0, -k % group_size), (0, 0)]
    if kind == "rms":
        squares = jnp.pad(jnp.square(matrix), edge).reshape(-1, group_size, n)
        first = np.arange(0, k, group_size)
        counts = np.minimum(group_size, k - first).astype(np.float32)  # the last may be shorter
        return jnp.sqrt(squares.sum(axis=1) / counts[:, None]), None
    groups = jnp.pad(matrix, edge, mode="edge").reshape(-1, group_size, n)
    # The largest of numbers and NaN may be a number, but no code stands for NaN.
    mark = jnp.where(jnp.isnan(groups).any(axis=1), jnp.nan, 1.0)
    if kind == "absmax":
        return mark * jnp.abs(groups).max(axis=1), None
    low = groups.min(axis=1)
    return mark * (groups.max(axis=1) - low), low


# Multiples of a group's usual scale to choose from; of those that are alike the first wins. The
# largest entry may count little, but the root mean square is near the best for normal numbers.
_FACTORS = {
    "absmax": (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6),
    "range": (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6),
    "rms": (1, 0.9, 0.95, 1.05, 1.1),
}


@functools.partial(jax.jit, static_argnames=("config", "batch_ndim", "view"))
def _quantize(
    weight: jax.Array,
    hessian: jax.Array | None,
    config: LutConfig,
    batch_ndim: int,
    view: MatrixView,
) -> LutArray | RotatedArray:
    if batch_ndim:  # one after the other, as temporaries are several times a matrix
        one = functools.partial(_quantize, config=config, batch_ndim=batch_ndim - 1, view=view)
        return jax.lax.map(lambda pair: one(*pair), (weight, hessian))
    matrix = view.to_matrix(weight, 0).astype(jnp.float32)
    k, _ = matrix.shape
    group_size = k if config.group_size == COLUMN else int(config.group_size)
    if config.rotate:
        matrix = rotate(matrix.T, group_size).T
        if hessian is not None:
            hessian = rotate(rotate(hessian, group_size).T, group_size)
    scales, offsets = fit_scales(matrix, group_size, config.scaling)
    if hessian is not None:
        inputs = jnp.diagonal(hessian)
        inputs += DAMPING * inputs.mean()
        if config.table() is not None:
            scales, offsets = _best_scales(matrix, inputs, scales, offsets, group_size, config)

    stored, stored_offsets = _stored(scales, config), _stored(offsets, config)

    # Codes are chosen for the scales as they will be read back, rounding included.
    used = _expand(expanded(stored).astype(jnp.float32), group_size, k)
    divisor = jnp.where(used == 0, 1, used)
    shift = None
    if offsets is not None:
        shift = _expand(expanded(stored_offsets).astype(jnp.float32), group_size, k)
    units = (matrix if shift is None else matrix - shift) / divisor

    fixed = config.table()
    if fixed is None:
        weights = divisor**2
        if hessian is not None:  # an expert may have seen nothing
            weights *= jnp.where(inputs.any(), inputs, 1)[:, None]
        table = codebooks.kmeans(units, weights=weights, bits=config.bits)
    else:
        table = jnp.asarray(fixed)[None]
    lut = table if config.vector_size > 1 else table[..., None]
    if hessian is None:
        codes = _nearest(units, table if fixed is None else fixed)
    else:
        codes = round_with_feedback(matrix, hessian, used, shift, lut)
    array = LutArray(
        words=pack(codes, config.bits),
        scales=stored,
        lut=lut,
        offsets=stored_offsets,
        group_size=group_size,
        padding=-k % (BLOCK * config.vector_size),
        dtype=np.dtype(weight.dtype),
        view=view,
    )
    return RotatedArray(array, group_size) if config.rotate else array


def _stored(scales: jax.Array | None, config: LutConfig) -> Any:
    """Scales or offsets in the form in which they are kept."""
    if scales is None:
        return None
    if config.double_quant is None:
        return scales.astype(config.scale_dtype)
    return quantize_scales(scales, config.double_quant)


def _best_scales(
    matrix: Float[Array, "k n"],
    inputs: Float[Array, " k"],
    scales: Float[Array, "g n"],
    offsets: Float[Array, "g n"] | None,
    group_size: int,
    config: LutConfig,
) -> tuple[Float[Array, "g n"], Float[Array, "g n"] | None]:
    """The multiple of each group's scale with the least error, rows weighed by their inputs.

    Ranges shrink towards their middle.
    """
    k, n = matrix.shape
    fixed = config.table()
    assert fixed is not None

    def tried(factor: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        moved = None if offsets is None else offsets + (1 - factor) / 2 * scales
        return factor * scales, moved

    def error(factor: jax.Array) -> jax.Array:
        scale, offset = (None if a is None else _expand(a, group_size, k) for a in tried(factor))
        assert scale is not None
        scale = jnp.where(scale == 0, 1, scale)
        shifted = matrix if offset is None else matrix - offset
        off = shifted - _values(_nearest(shifted / scale, fixed), fixed, k) * scale
        squares = jnp.pad(jnp.square(off) * inputs[:, None], [(0, -k % group_size), (0, 0)])
        return squares.reshape(-1, group_size, n).sum(axis=1)

    factors = jnp.asarray(_FACTORS[config.scaling], jnp.float32)
    return tried(factors[jnp.argmin(jax.lax.map(error, factors), axis=0)])


def _nearest(units: jax.Array, table: np.ndarray | jax.Array) -> jax.Array:
    """Codes of the nearest entries of a fixed table, or of a fitted one ``[1, C]``."""
    if isinstance(table, np.ndarray) and table.ndim > 1:
        return codebooks.nearest_vectors(units, table)
    return codebooks.nearest_codes(units, table)


def _values(codes: jax.Array, table: np.ndarray, k: int) -> jax.Array:
    """The entries ``[K, N]`` of a fixed table that codes stand for."""
    entries = jnp.asarray(table)[codes.astype(jnp.int32)]
    if table.ndim == 1:
        return entries
    return jnp.moveaxis(entries, -1, -2).reshape(-1, codes.shape[-1])[:k]


def _expand(groups: Float[Array, "g n"], group_size: int, k: int) -> Float[Array, "k n"]:
    """Repeats what a group shares for each of its rows."""
    return jnp.repeat(groups, group_size, axis=0)[:k]


def _check_scales(
    array: LutArray | RotatedArray, weight: Any, config: LutConfig, path: str
) -> None:
    """Raises if finite weights have scales that their dtype cannot hold."""
    codes = array.base if isinstance(array, RotatedArray) else array
    assert isinstance(codes, LutArray)
    for values in jax.tree.leaves((codes.scales, codes.offsets)):
        found = concrete(values)
        if found is not None and not np.isfinite(found.astype(np.float32)).all():
            raise ValueError(
                f"a scale of {path!r} overflows {config.scale_dtype}; use scale_dtype='float32'"
            )
    if codes.offsets is None and isinstance(codes.scales, jax.Array):
        found = concrete(codes.scales)
        if found is not None and not found.any() and np.any(concrete(weight)):
            raise ValueError(
                f"the scales of {path!r} underflow {config.scale_dtype}; use scale_dtype='float32'"
            )


def _not_a_matrix(leaf: Any) -> str | None:
    if is_compressed(leaf):
        return f"it is compressed already: {leaf!r}; materialize it first"
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", ())
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return f"its dtype is {dtype}, not floating point"
    if len(shape) < 2:
        return f"its shape {shape} has fewer than two axes"
    return None
