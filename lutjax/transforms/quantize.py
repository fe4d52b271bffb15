"""Dense parameters to lookup-table weights."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lutjax import codebooks
from lutjax.arrays import (
    LutArray,
    MatrixView,
    QuantizedScales,
    RotatedArray,
    is_compressed,
    quantize_scales,
)
from lutjax.packing import BLOCK, pack
from lutjax.paths import named_leaves, path_string
from lutjax.rotation import rotate
from lutjax.transforms.recipe import COLUMN, LutConfig, Recipe, Rule


def quantize(
    params: Any,
    recipe: Recipe | None = None,
    *,
    allow_nonfinite: bool = False,
    **uniform: Any,
) -> Any:
    """Replaces weight matrices by :class:`LutArray` codes, as a recipe says.

    Each group of G weights along the contraction axis is scaled by its absolute maximum (by its
    range, for affine tables; by its root mean square, for ``"gaussian"`` ones) and every weight
    becomes the code of the nearest table value. Weights that are rotated first become a
    :class:`lutjax.arrays.RotatedArray` of such codes.

    Works under ``jit`` and ``jax.eval_shape``. Matrices are handled one after the other, so the
    peak memory is the result plus a few times the largest matrix.

    Args:
      params: A pytree of parameters, or a single weight ``[..., K, N]``.
      recipe: What to do with which path; by default ``Recipe.uniform(**uniform)``.
      allow_nonfinite: Do not look for NaN and infinity in the weights.
      **uniform: Arguments of :meth:`Recipe.uniform`, if no recipe is given.

    Returns:
      A pytree like ``params``, compressed where the recipe says so.

    Raises:
      ValueError: If a rule matches nothing, a group is larger than K, or a weight is not finite;
        the message names the parameter path.
      TypeError: If a rule reaches a leaf that is no floating-point matrix, or is compressed.

    Source: FLUTE (arXiv 2407.10960), QLoRA (arXiv 2305.14314, section 2), HIGGS (arXiv 2411.17525).

    >>> params = {"mlp": {"kernel": jnp.ones((128, 32)), "bias": jnp.zeros(32)}}
    >>> quantize(params, Recipe.uniform(bits=3, group_size=32))["mlp"]["kernel"]
    LutArray(shape=(128, 32), float32, 3 bits, group_size=32, 1.8 kB)
    """
    if recipe is None:
        recipe = Recipe.uniform(**uniform)
    elif uniform:
        raise TypeError(f"give either a recipe or {', '.join(uniform)}, not both")
    if is_compressed(params) or jax.tree_util.all_leaves([params]):
        return quantize_array(
            params, recipe.rules[0], path="array", allow_nonfinite=allow_nonfinite
        )
    plan = match_rules(recipe, params)

    def convert(key_path, leaf):
        path = path_string(key_path)
        if path not in plan:
            return leaf
        return quantize_array(leaf, plan[path], path=path, allow_nonfinite=allow_nonfinite)

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=is_compressed)


def match_rules(recipe: Recipe, params: Any) -> dict[str, Rule]:
    """Which rule applies to which path of ``params``, checked before anything is computed.

    Paths that stay dense are left out. Of the paths that a glob matches, those that are no
    floating-point matrix stay dense; one that is named in full must be a matrix.

    Raises:
      ValueError: If a rule matches nothing, or a configuration does not fit a weight.
      TypeError: If a path that is named in full is not a floating-point matrix.
    """
    leaves = named_leaves(params)
    recipe.check_matches(path for path, _ in leaves)
    plan = {}
    for path, leaf in leaves:
        rule = recipe.rule_for(path)
        if rule is None or rule.config is None:
            continue
        problem = _not_a_matrix(leaf)
        if problem is None:
            plan[path] = rule
            check_fit(leaf.shape, rule, path)
        elif rule.pattern == path:
            raise TypeError(f"cannot quantize {path!r}: {problem}")
    return plan


def check_fit(shape: tuple[int, ...], rule: Rule, path: str) -> None:
    """Checks that a rule's configuration fits a weight of logical ``shape``.

    Raises:
      ValueError: If an axis does not exist or the group is larger than K.
    """
    assert rule.config is not None
    batch_ndim, view = weight_view(shape, rule, path)
    k = int(np.prod([shape[batch_ndim + axis] for axis in view.k_axes]))
    group_size = rule.config.group_size
    if isinstance(group_size, int) and group_size > k:
        raise ValueError(
            f"group_size={group_size} is larger than K={k} of {path!r} {shape}; use a smaller "
            f"group{'' if rule.config.rotate else f' or {COLUMN!r}'}, or say with axis= in a rule "
            f"which axes are summed over"
        )


def weight_view(shape: tuple[int, ...], rule: Rule, path: str) -> tuple[int, MatrixView]:
    """Number of batch axes, and the view, of a weight that a rule applies to.

    Raises:
      ValueError: If the rule's axes do not exist in ``shape``.
    """
    ndim = len(shape)
    axis = rule.axis
    if axis is None:
        # Flax NNX ends its paths with the field that holds the array.
        name = path.removesuffix("/value").rsplit("/", 1)[-1]
        axis = -1 if name in ("weight", "embedding") else -2
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
    allow_nonfinite: bool = False,
) -> LutArray | RotatedArray:
    """Quantises one weight; ``path`` names it in errors.

    Raises:
      ValueError: If the configuration does not fit, or the weight has NaN or infinity.
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
    return _quantize(jnp.asarray(weight), rule.config, batch_ndim, view)


def concrete(array: Any) -> np.ndarray | None:
    """The values of an array, or None while it is traced and has none yet."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        return None


def check_finite(weight: Any, path: str) -> None:
    """Raises ValueError naming ``path`` if a weight, unless it is traced, has NaN or infinity."""
    values = concrete(weight)
    if values is None:
        return
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ValueError(
            f"{path!r} has {bad} NaN or infinite values; mend the checkpoint, or pass "
            f"allow_nonfinite=True to quantize it as it is"
        )


def fit_scales(
    matrix: Float[Array, "*batch k n"], group_size: int, kind: Literal["absmax", "range", "rms"]
) -> tuple[Float[Array, "*batch g n"], Float[Array, "*batch g n"] | None]:
    """Scales, and offsets for affine tables, of groups of rows.

    Returns:
      ``(max |w|, None)``, ``(max w - min w, min w)`` or ``(sqrt(mean w**2), None)``, each
      ``float32[*batch, ceil(K/G), N]``.
    """
    *batch, k, n = matrix.shape
    edge = [(0, 0)] * len(batch) + [(0, -k % group_size), (0, 0)]
    if kind == "rms":
        squares = jnp.pad(jnp.square(matrix), edge).reshape(*batch, -1, group_size, n)
        first = np.arange(0, k, group_size)
        counts = np.minimum(group_size, k - first).astype(np.float32)  # the last may be shorter
        means = squares.sum(axis=-2) / counts.reshape(*[1] * len(batch), -1, 1)
        return jnp.sqrt(means), None
    groups = jnp.pad(matrix, edge, mode="edge").reshape(*batch, -1, group_size, n)
    if kind == "absmax":
        return jnp.abs(groups).max(axis=-2), None
    low = groups.min(axis=-2)
    return groups.max(axis=-2) - low, low


@functools.partial(jax.jit, static_argnames=("config", "batch_ndim", "view"))
def _quantize(
    weight: jax.Array, config: LutConfig, batch_ndim: int, view: MatrixView
) -> LutArray | RotatedArray:
    matrix = view.to_matrix(weight, batch_ndim).astype(jnp.float32)
    *batch, k, _ = matrix.shape
    group_size = k if config.group_size == COLUMN else int(config.group_size)
    if config.rotate:
        matrix = jnp.swapaxes(rotate(jnp.swapaxes(matrix, -1, -2), group_size), -1, -2)
    scales, offsets = fit_scales(matrix, group_size, config.scaling)

    stored: jax.Array | QuantizedScales
    if config.double_quant is None:
        stored = scales.astype(config.scale_dtype)
    else:
        stored = quantize_scales(scales, config.double_quant)
    if offsets is not None:
        offsets = offsets.astype(config.scale_dtype)

    # Codes are chosen for the scales as they will be read back, rounding included.
    used = stored.expand() if isinstance(stored, QuantizedScales) else stored.astype(jnp.float32)
    expand = functools.partial(jnp.repeat, repeats=group_size, axis=-2)
    divisor = expand(jnp.where(used == 0, 1, used))[..., :k, :]
    shifted = (
        matrix if offsets is None else matrix - expand(offsets.astype(jnp.float32))[..., :k, :]
    )
    units = shifted / divisor

    fixed = config.table()
    if fixed is None:
        fit = functools.partial(codebooks.kmeans, bits=config.bits)
        for _ in batch:
            fit = jax.vmap(fit)
        table = fit(units, weights=divisor**2)
        codes = codebooks.nearest_codes(units, table)
    else:
        nearest = codebooks.nearest_codes if fixed.ndim == 1 else codebooks.nearest_vectors
        codes = nearest(units, fixed)
        table = jnp.broadcast_to(jnp.asarray(fixed), (*batch, 1, *fixed.shape))
    array = LutArray(
        words=pack(codes, config.bits),
        scales=stored,
        lut=table if config.vector_size > 1 else table[..., None],
        offsets=offsets,
        group_size=group_size,
        padding=-k % (BLOCK * config.vector_size),
        dtype=np.dtype(weight.dtype),
        view=view,
    )
    return RotatedArray(array, group_size) if config.rotate else array


def _not_a_matrix(leaf: Any) -> str | None:
    if is_compressed(leaf):
        return f"it is compressed already: {leaf!r}; materialize it first"
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", ())
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return f"its dtype is {dtype}, not floating point"
    if len(shape) < 2:
        return f"its shape {shape} has fewer than two axes"
    return None
