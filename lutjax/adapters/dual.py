"""The adapter that a projected optimiser is the dual of, and conversion in the middle of a run."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, UInt32

from lutjax.adapters.array import AdapterArray
from lutjax.linear_maps import BoundMap
from lutjax.optim.project import (
    ProjectConfig,
    ProjectedTransformation,
    ProjectState,
    is_projected,
    map_projected,
    zero_latents,
)


class AdapterState(NamedTuple):
    """A training run in its adapter form.

    Attributes:
      base: The frozen weights `theta_0`; of parameters without an adapter only the shape matters.
      latents: What is trained: `lambda` for adapted parameters, the parameter itself for others.
      maps: The maps `S`, by path.
      inner: State of the inner transformation over `latents`; the same as in the other form.
      count: Updates so far.
      key_data: The key that maps are drawn from.
    """

    base: Any
    latents: Any
    maps: dict[str, BoundMap]
    inner: Any
    count: Int32[Array, ""]  # type: ignore[assignment]
    key_data: UInt32[Array, "..."]


@dataclasses.dataclass(frozen=True)
class AdapterTraining:
    """Training of `theta_0 + S^T lambda`, the dual of a projected optimiser.

    Made by :func:`dual`. All methods are pure, and can be jitted.

    Attributes:
      config: The arguments of the :func:`lutjax.optim.project` that this is the dual of.
    """

    config: ProjectConfig

    def init(self, params: Any) -> AdapterState:
        """A run that starts from `params`."""
        projected = ProjectedTransformation.of(self.config).init(params)
        state = self.from_projected(params, projected)
        # Adapters start at zero, which an inner transformation may remember, not at `S theta`.
        inner = self.config.grouped_inner(is_projected(state.maps, params)).init(state.latents)
        return state._replace(inner=inner)

    def from_projected(self, params: Any, state: ProjectState) -> AdapterState:
        """The adapter form of a run of the projected optimiser, at any step.

        The weights so far become the base, not a copy of them, and `lambda` starts at zero; the
        optimiser state is carried over as it is.
        """
        self.config.check_maps(state.maps, params)
        latents = zero_latents(state.maps, params)
        return AdapterState(params, latents, state.maps, state.inner, state.count, state.key_data)

    def to_projected(self, state: AdapterState) -> tuple[Any, ProjectState]:
        """The weights and the projected optimiser's state of this run, at any step."""
        projected = ProjectState(state.count, state.key_data, state.maps, state.inner)
        return self.weights(state), projected

    def weights(self, state: AdapterState, latents: Any = None) -> Any:
        """The weights `theta_0 + S^T lambda`, dense.

        Args:
          state: The run.
          latents: In place of `state.latents`, to differentiate with respect to them.
        """
        latents = state.latents if latents is None else latents
        return map_projected(lambda m, r, w: m.adapter(w, r), state.maps, latents, state.base)

    def adapted(self, state: AdapterState, latents: Any = None) -> Any:
        """The weights as :class:`AdapterArray`, for a model under :func:`lutjax.lift`.

        The backward pass then never forms the gradient of a whole weight.
        """
        latents = state.latents if latents is None else latents
        return map_projected(
            lambda m, r, w: AdapterArray.of(w, m, r), state.maps, latents, state.base
        )

    def update(self, gradients: Any, state: AdapterState, **extra_args: Any) -> AdapterState:
        """One step of the inner transformation on the latents; it never refreshes maps.

        Args:
          gradients: Of the loss with respect to `state.latents`.
          state: The run.
          **extra_args: For the inner transformation.
        """
        config = self.config
        if config.axis_name is not None:
            gradients = jax.lax.pmean(gradients, config.axis_name)
        inner = config.grouped_inner(is_projected(state.maps, gradients))
        updates, inner_state = inner.update(gradients, state.inner, state.latents, **extra_args)
        updates = map_projected(
            lambda m, r: r * jnp.asarray(config.scale, r.dtype), state.maps, updates
        )
        return state._replace(
            latents=optax.apply_updates(state.latents, updates),
            inner=inner_state,
            count=optax.safe_increment(state.count),
        )

    def is_due(self, state: AdapterState) -> Array:
        """Whether a new period begins, so that :meth:`refresh` must come before :meth:`update`."""
        return self.config.is_due(state.count)

    def refresh(self, state: AdapterState, gradients: Any = None) -> AdapterState:
        """Merges the adapters into the base, draws new maps, and carries the optimiser state over.

        Args:
          state: The run.
          gradients: Of the loss with respect to the whole weights, for maps that depend on them.
        """
        config = self.config
        weights = self.weights(state)
        key = jax.random.wrap_key_data(state.key_data, impl=config.key_impl)
        maps = config.refresh_maps(key, state.count, state.maps, gradients, weights)
        latents = zero_latents(maps, weights)
        inner = config.carry_inner(state.inner, latents, state.maps, maps)
        return state._replace(base=weights, latents=latents, maps=maps, inner=inner)


@overload
def dual(setup: ProjectedTransformation) -> AdapterTraining: ...
@overload
def dual(setup: AdapterTraining) -> ProjectedTransformation: ...
def dual(
    setup: ProjectedTransformation | AdapterTraining,
) -> AdapterTraining | ProjectedTransformation:
    """The other form of a training setup.

    `project(u, S)` on the weights `theta`, and `u` on `lambda` in `theta_0 + S^T lambda`, give the
    same trajectory and the same optimiser state, for any optimiser `u` that works on gradients
    alone. Conversion in the middle of a run: :meth:`AdapterTraining.from_projected` and
    :meth:`AdapterTraining.to_projected`.

    The forms differ when `u` looks at parameters (weight decay, trust ratios, Adafactor's parameter
    scale): it is given `S theta` in one form and `lambda` in the other; and when gradients are
    changed before the map (clipping by the norm of the full gradient).

    Args:
      setup: What :func:`lutjax.optim.project` or one of its aliases returned, or the dual of it.

    Returns:
      An :class:`AdapterTraining`, or the optimiser again.

    Raises:
      TypeError: For another transformation, such as a chain around a projected one.

    Source: Duality (arXiv 2502.13811, theorem 1).

    >>> from lutjax.linear_maps import SemiOrthogonal
    >>> from lutjax.optim import project
    >>> training = dual(project(optax.sgd(0.1), SemiOrthogonal(2), refresh_every=None))
    >>> state = training.init({"w": jnp.ones((4, 6))})
    >>> def loss(latents):
    ...     return jnp.sum(training.weights(state, latents)["w"] ** 2)
    >>> state = training.update(jax.grad(loss)(state.latents), state)
    >>> state.latents["w"].shape
    (2, 6)
    """
    if isinstance(setup, ProjectedTransformation):
        return AdapterTraining(setup.config)
    if isinstance(setup, AdapterTraining):
        return ProjectedTransformation.of(setup.config)
    raise TypeError(
        f"dual needs a transformation made by project (or its dual), not {type(setup).__name__}; "
        "put what is chained around it inside: project(optax.chain(...), map)"
    )
