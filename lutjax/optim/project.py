"""Any optimiser in the space of a linear map: `theta <- theta + S^T u(S g)`."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PRNGKeyArray, UInt32

from lutjax.linear_maps import BoundMap, DimensionNumbers, LinearMap
from lutjax.linear_maps.dimension_numbers import (
    WeightDimensionNumbers,
    resolve_dimension_numbers,
)
from lutjax.linear_maps.sketches import SketchMap
from lutjax.optim._explicit import init_with_auto_axes, update_with_auto_axes
from lutjax.optim._state import is_coded, leaf_paths, map_moments, restart
from lutjax.optim.quantized import reencode
from lutjax.paths import map_named, named_leaves, path_key
from lutjax.tracing import concrete

OnRefresh = Literal["keep", "reset", "rotate"]


class ProjectState(NamedTuple):
    """State of :func:`project`.

    Attributes:
      count: Updates so far.
      key_data: The key that maps are drawn from, as plain integers.
      maps: The current map of every projected parameter, by path.
      inner: State of the inner transformation, whose parameters are the latents.
    """

    count: Int32[Array, ""]  # type: ignore[assignment]
    key_data: UInt32[Array, "..."]
    maps: dict[str, BoundMap]
    inner: Any


@dataclasses.dataclass(frozen=True)
class ProjectConfig:
    """The arguments of :func:`project`; also what :func:`lutjax.adapters.dual` works from."""

    inner: optax.GradientTransformationExtraArgs
    map: LinearMap
    refresh_every: int | None
    scale: float
    on_refresh: OnRefresh
    weight_dimension_numbers: WeightDimensionNumbers
    key_data: Any
    key_impl: str
    axis_name: Any

    @property
    def key(self) -> PRNGKeyArray:
        """Where maps are drawn from."""
        return jax.random.wrap_key_data(self.key_data, impl=self.key_impl)

    def numbers(self, params: Any) -> dict[str, DimensionNumbers]:
        """The projected parameters among `params`, and which of their axes make the matrix."""
        return resolve_dimension_numbers(params, self.weight_dimension_numbers)

    def init_maps(self, key: PRNGKeyArray, params: Any) -> dict[str, BoundMap]:
        """A map for each projected parameter.

        Raises:
          ValueError: When the map does not fit a parameter, naming it.
        """
        numbers = self.numbers(params)
        maps = {}
        for path, leaf in _by_path(params).items():
            if path not in numbers:
                continue
            try:
                maps[path] = self.map.init(
                    path_key(key, path),
                    leaf.shape,
                    dtype=leaf.dtype,
                    dimension_numbers=numbers[path],
                )
            except ValueError as error:
                fix = ""
                if self.weight_dimension_numbers is None:
                    fix = (
                        "; None projects every leaf with two axes or more: if this is no matrix, "
                        "say which are, weight_dimension_numbers=matching(...)"
                    )
                raise ValueError(f"{path!r}: {error}{fix}") from None
        return maps

    def is_due(self, count: Array) -> Array:
        """Whether a period begins at step `count`, with new maps."""
        from_data = self.map.depends_on != "key"
        if self.refresh_every is None:
            return (count == 0) & from_data
        # The first random maps were drawn by init.
        return (count % self.refresh_every == 0) & (from_data | (count > 0))

    def refresh_maps(
        self,
        key: PRNGKeyArray,
        count: Array,
        maps: dict[str, BoundMap],
        gradients: Any,
        params: Any,
    ) -> dict[str, BoundMap]:
        """The maps of the period that begins at step `count`."""
        epoch_key = jax.random.fold_in(key, count)
        gradient_of = {} if gradients is None else _by_path(gradients)
        weight_of = {} if params is None else _by_path(params)
        refreshed = {}
        for path, bound in maps.items():
            gradient = gradient_of.get(path)
            if self.map.depends_on == "gradient" and self.axis_name is not None:
                gradient = jax.lax.pmean(gradient, self.axis_name)
            refreshed[path] = self.map.refresh(
                bound, path_key(epoch_key, path), gradient, weight_of.get(path)
            )
        return refreshed

    def check_maps(self, maps: dict[str, BoundMap], params: Any) -> None:
        """Raises when `maps` are not those that this configuration makes for `params`."""
        expected = jax.eval_shape(lambda params: self.init_maps(self.key, params), params)
        if maps.keys() != expected.keys():
            raise ValueError(
                f"the state projects {sorted(maps)}, but this transformation projects "
                f"{sorted(expected)}; resume with the weight_dimension_numbers that made the state"
            )
        for path, want in expected.items():
            if _signature(maps[path]) != _signature(want):
                raise ValueError(
                    f"the state's map of {path!r}, {_describe(maps[path])}, is not one that "
                    f"{self.map} makes, {_describe(want)}; resume with the map that made the state"
                )

    def grouped_inner(self, projected: Any) -> optax.GradientTransformationExtraArgs:
        """The inner transformation for latents; `projected` is a tree of booleans.

        With ``on_refresh="reset"`` projected and other parameters have inner states of their own,
        so that the steps that bias correction counts can be reset for the former alone.
        """
        if self.on_refresh != "reset":
            return self.inner
        labels = jax.tree.map(lambda p: "projected" if p else "other", projected)
        # As a function: a tree that can be called, such as an Equinox module, would be.
        return optax.partition({"projected": self.inner, "other": self.inner}, lambda _: labels)

    def carry_inner(
        self, inner: Any, latents: Any, old: dict[str, BoundMap], new: dict[str, BoundMap]
    ) -> Any:
        """The inner state after a refresh; `latents` are like those of the new maps."""
        if self.on_refresh == "keep":
            return inner
        if self.on_refresh == "reset":
            fresh = self.grouped_inner(is_projected(new, latents)).init(latents)
            states = dict(inner.inner_states)
            states["projected"] = restart(
                fresh.inner_states["projected"], inner.inner_states["projected"], latents
            )
            return inner._replace(inner_states=states)
        shapes = {path: latent.shape for path, latent in _by_path(latents).items()}

        def carry(path: str, order: Literal[1, 2], moment: Any) -> Any:
            if is_coded(moment):
                return reencode(carry(path, order, moment.materialize()), moment, order)
            if moment.shape != shapes[path]:  # a factored second moment, or what stands for none
                return moment
            return new[path].carry(old[path], moment, order).astype(moment.dtype)

        return map_moments(carry, inner, _projected_paths(new, latents))[0]


class ProjectedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation made by :func:`project`, with its configuration attached."""

    config: ProjectConfig

    @classmethod
    def of(cls, config: ProjectConfig) -> ProjectedTransformation:
        """The transformation of a configuration."""
        result = cls(
            functools.partial(init_with_auto_axes, functools.partial(_init, config)),
            functools.partial(_update_anywhere, config),
        )
        result.config = config
        return result


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(named_leaves(tree, is_leaf=None))


def _projected_paths(maps: dict[str, BoundMap], tree: Any) -> dict[Any, str]:
    return {keys: path for keys, path in leaf_paths(tree).items() if path in maps}


def _signature(bound: BoundMap) -> Any:
    """What identifies a map, but not the dtype of its factors: gradients may have another one."""

    def is_sketch(x: Any) -> bool:
        return isinstance(x, SketchMap)

    plain = jax.tree.map(
        lambda x: dataclasses.replace(x, dtype="") if is_sketch(x) else x, bound, is_leaf=is_sketch
    )
    leaves, treedef = jax.tree.flatten(plain)
    return treedef, [leaf.shape for leaf in leaves]


def _describe(bound: BoundMap) -> str:
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", bound))


def map_projected(function: Any, maps: dict[str, BoundMap], tree: Any, *rest: Any) -> Any:
    """`function(map, leaf, *rest)` on projected leaves; other leaves of `tree` stay as they are."""

    def visit(path: str, leaf: Any, *others: Any) -> Any:
        return function(maps[path], leaf, *others) if path in maps else leaf

    return map_named(visit, tree, *rest, is_leaf=None)


def _latents(maps: dict[str, BoundMap], weights: Any) -> Any:
    """`S theta`; leaves without a map are copies, which can be donated."""

    def visit(path: str, leaf: Any) -> Any:
        return maps[path].down(leaf) if path in maps else jnp.copy(leaf)

    return map_named(visit, weights, is_leaf=None)


def zero_latents(maps: dict[str, BoundMap], weights: Any) -> Any:
    """Latents of adapters at the start of a period; leaves without a map are copies."""
    # Computed, so that they are sharded as the weight is.
    return map_projected(lambda m, x: jnp.zeros_like(x), maps, _latents(maps, weights))


def is_projected(maps: dict[str, BoundMap], tree: Any) -> Any:
    """A tree of booleans: which leaves have a map."""
    return map_named(lambda path, _: path in maps, tree, is_leaf=None)


def project(
    inner: optax.GradientTransformation,
    map: LinearMap,
    *,
    refresh_every: int | None = 200,
    scale: float = 1.0,
    on_refresh: OnRefresh = "keep",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    key: PRNGKeyArray | int | None = None,
    axis_name: Any = None,
) -> ProjectedTransformation:
    r"""Runs any gradient transformation in the space of a linear map.

    `theta <- theta + scale S^T u(S g_0, ..., S g_t)` for each projected parameter, where `u` is the
    inner transformation: exactly the training of `lambda` in `theta_0 + S^T lambda` by the same
    transformation, see :func:`lutjax.adapters.dual`. Other parameters go to the inner
    transformation as they are. Its state has the size of the latents.

    Inner transformations that use parameters (decoupled weight decay, trust ratios) are given
    `S theta`. With ``optax.inject_hyperparams``, name `rank` and `refresh_every` of an alias among
    its ``static_args``, since shapes depend on them, and a function for `weight_dimension_numbers`,
    which would be taken for a schedule. Wrap ``optax.apply_if_finite`` and
    :func:`lutjax.optim.skip_nonfinite` around the whole: inside they do not keep NaN from the maps.

    Args:
      inner: Any optax transformation. With gradient accumulation inside,
        ``project(optax.MultiSteps(...).gradient_transformation(), ...)``, gradients accumulate in
        the latent space; then `refresh_every` must be a multiple of the accumulation steps.
      map: The rule for `S`, e.g. ``SVD(rank=128)``.
      refresh_every: Steps between new maps; ``None`` never changes them (after the first step, for
        maps that depend on data).
      scale: Factor on the projected updates only (GaLore's `alpha`).
      on_refresh: What happens to the inner state of projected parameters at a refresh: ``"keep"``
        leaves it (GaLore), ``"reset"`` starts its moments and their counts anew (ReLoRA), but not
        schedules and hyperparameters, ``"rotate"`` moves first moments into the new space,
        `S_new S_old^T m`. With ``"reset"`` projected and other parameters have inner states of
        their own, so what works on all at once sees them apart; clip by the global norm outside,
        ``optax.chain(optax.clip_by_global_norm(1.0), project(...))``.
      weight_dimension_numbers: Which leaves are projected, and which of their axes make the matrix:
        see :func:`lutjax.linear_maps.resolve_dimension_numbers`.
      key: Where maps are drawn from; an integer is a seed, and None is seed 0.
      axis_name: Mesh axis (or axes) over which gradients differ, inside ``shard_map``. Latents are
        averaged over it before the inner transformation, so full gradients stay on their device,
        except at a refresh of a map that depends on them.

    Returns:
      A transformation whose state is a :class:`ProjectState`.

    Raises:
      TypeError: For a schedule as `refresh_every`.
      ValueError: For `refresh_every` < 1, an unknown `on_refresh`, a rank that a parameter does not
        have, dimension numbers that do not fit, ``"rotate"`` without a first moment, or a state
        that another map has made.

    Source: Duality (arXiv 2502.13811, section 3), GaLore (arXiv 2403.03507).

    >>> from lutjax.linear_maps import SVD
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
    >>> optimizer = project(optax.adam(1e-3), SVD(rank=2))
    >>> state = optimizer.init(params)
    >>> state.inner[0].mu["w"].shape
    (2, 8)
    >>> updates, state = optimizer.update(params, state, params)
    >>> updates["w"].shape
    (4, 8)
    """
    if callable(refresh_every):
        raise TypeError("refresh_every must be a number of steps or None, not a schedule")
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"refresh_every={refresh_every} must be at least 1, or None for never")
    if on_refresh not in ("keep", "reset", "rotate"):
        raise ValueError(f"on_refresh={on_refresh!r} must be 'keep', 'reset' or 'rotate'")
    if callable(scale):
        raise TypeError(f"scale={scale!r} must be a number; vary it with optax.inject_hyperparams")
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")
    drawn_from = _as_key(0 if key is None else key)
    key_data = jax.random.key_data(drawn_from)
    constant = concrete(key_data)  # an array has the mesh that was set when it was made in its type
    config = ProjectConfig(
        inner=optax.with_extra_args_support(inner),
        map=map,
        refresh_every=refresh_every,
        scale=scale,
        on_refresh=on_refresh,
        weight_dimension_numbers=weight_dimension_numbers,
        key_data=key_data if constant is None else constant,
        key_impl=str(jax.random.key_impl(drawn_from)),
        axis_name=axis_name,
    )
    return ProjectedTransformation.of(config)


def _as_key(key: Any) -> PRNGKeyArray:
    """A key, or that of a seed, which may be an array: ``inject_hyperparams`` makes it one."""
    is_seed = isinstance(key, int) or (key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer))
    return jax.random.key(key) if is_seed else key


def _init(config: ProjectConfig, params: Any) -> ProjectState:
    count = jnp.zeros((), jnp.int32)
    # A copy: whoever donates the state still needs the key.
    key_data = jnp.copy(config.key_data)
    if not jax.tree.leaves(params):
        # Nothing to train, or the placeholder by which optax finds parameters in a state, which
        # then needs something in the place of the maps.
        inner = config.grouped_inner(params).init(params)
        return ProjectState(count, key_data, jnp.zeros((), jnp.int32), inner)  # type: ignore[arg-type]
    maps = config.init_maps(config.key, params)
    inner = config.grouped_inner(is_projected(maps, params)).init(_latents(maps, params))
    if config.on_refresh == "rotate" and maps:
        projected = _projected_paths(maps, params)
        _, found = map_moments(lambda path, order, moment: moment, inner, projected)
        if not found:
            raise ValueError(
                "on_refresh='rotate' found no first moment (a field mu, trace or ema) in the state "
                "of the inner transformation; use 'keep' or 'reset'"
            )
    return ProjectState(count, key_data, maps, inner)


def _update_anywhere(
    config: ProjectConfig, updates: Any, state: ProjectState, params: Any = None, **extra_args: Any
) -> tuple[Any, ProjectState]:
    update = functools.partial(_update, config)
    return update_with_auto_axes(update, updates, state, params, extra_args)


def _update(
    config: ProjectConfig, updates: Any, state: ProjectState, params: Any, **extra_args: Any
) -> tuple[Any, ProjectState]:
    if not jax.tree.leaves(updates):
        inner = config.grouped_inner(updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return updates, state._replace(count=optax.safe_increment(state.count), inner=inner_state)
    config.check_maps(state.maps, updates)
    if config.map.depends_on == "weight" and params is None:
        raise ValueError(f"{config.map} is refreshed from the weights; pass params to update")
    transformation = config.grouped_inner(is_projected(state.maps, updates))
    maps, inner_state = _refreshed(config, updates, state, params)
    down = functools.partial(map_projected, lambda m, x: m.down(x), maps)
    latents = down(updates)
    if config.axis_name is not None:
        latents = jax.lax.pmean(latents, config.axis_name)
    latent_updates, inner_state = transformation.update(
        latents, inner_state, None if params is None else down(params), **extra_args
    )
    scale = config.scale
    new_updates = map_projected(
        lambda m, r: m.up(r) * jnp.asarray(scale, r.dtype), maps, latent_updates
    )
    count = optax.safe_increment(state.count)
    return new_updates, ProjectState(count, state.key_data, maps, inner_state)


def _refreshed(
    config: ProjectConfig, updates: Any, state: ProjectState, params: Any
) -> tuple[dict[str, BoundMap], Any]:
    """Maps and inner state for this step; new ones where a period begins."""
    fixed = config.refresh_every is None and config.map.depends_on == "key"
    if fixed or not state.maps:
        return state.maps, state.inner
    key = jax.random.wrap_key_data(state.key_data, impl=config.key_impl)

    def refresh(updates: Any, params: Any, maps: Any, inner: Any) -> Any:
        new = config.refresh_maps(key, state.count, maps, updates, params)
        start = _latents(new, updates if params is None else params)
        return new, config.carry_inner(inner, start, maps, new)

    return jax.lax.cond(
        config.is_due(state.count),
        refresh,
        lambda updates, params, maps, inner: (maps, inner),
        updates,
        params,
        state.maps,
        state.inner,
    )
