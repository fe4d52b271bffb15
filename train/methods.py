"""Pretraining methods by name: what is trained, and by which optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from lutjax import optim
from lutjax.linear_maps import Gaussian, SemiOrthogonal, matching
from lutjax.optim.project import ProjectedTransformation

PROJECTED = ("*self_attn/*_proj/kernel", "*mlp/*_proj/kernel")
"""What is projected: the matrices of attention and MLP, as in the GaLore paper."""


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """What a method is built from.

    Attributes:
      learning_rate: A schedule.
      rank: Rank of projections and adapters.
      refresh_every: Steps between new projections, merges or resets.
      scale: Factor on projected updates; the method's own default if None.
      seed: For random maps.
    """

    learning_rate: optax.ScalarOrSchedule
    rank: int = 64
    refresh_every: int = 200
    scale: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimiser, and whether it trains weights or, its dual, adapters."""

    optimizer: optax.GradientTransformation
    adapters: bool = False


def _common(options: MethodOptions) -> dict[str, Any]:
    return {
        "rank": options.rank,
        "refresh_every": options.refresh_every,
        "weight_dimension_numbers": matching(*PROJECTED),
        "key": options.seed,
    }


def _scaled(options: MethodOptions) -> dict[str, Any]:
    scale = {} if options.scale is None else {"scale": options.scale}
    return _common(options) | scale


def _semi_orthogonal(options: MethodOptions) -> ProjectedTransformation:
    return optim.project(
        optax.adam(options.learning_rate),
        SemiOrthogonal(options.rank),
        refresh_every=options.refresh_every,
        scale=1.0 if options.scale is None else options.scale,
        weight_dimension_numbers=matching(*PROJECTED),
        key=options.seed,
    )


def _one_sided_lora(options: MethodOptions) -> ProjectedTransformation:
    return optim.relora(options.learning_rate, map=Gaussian(options.rank), **_scaled(options))


def _lift(options: MethodOptions) -> optax.GradientTransformation:
    return optim.lift(options.learning_rate, budget_rank=options.rank, **_common(options))


METHODS: dict[str, Callable[[MethodOptions], Method]] = {
    "adam": lambda o: Method(optax.adam(o.learning_rate)),
    "adam_8bit": lambda o: Method(optim.quantized_state(optax.adam(o.learning_rate))),
    "adam_4bit": lambda o: Method(optim.quantized_state(optax.adam(o.learning_rate), bits=4)),
    "spam": lambda o: Method(optim.spam(o.learning_rate, reset_every=o.refresh_every)),
    "galore": lambda o: Method(optim.galore(o.learning_rate, **_scaled(o))),
    "galore_8bit": lambda o: Method(
        optim.quantized_state(optim.galore(o.learning_rate, **_scaled(o)))
    ),
    "flora": lambda o: Method(optim.flora(o.learning_rate, **_scaled(o))),
    "semi_orthogonal": lambda o: Method(_semi_orthogonal(o)),
    "lift": lambda o: Method(_lift(o)),
    "relora": lambda o: Method(_one_sided_lora(o)),
    "one_sided_lora": lambda o: Method(_one_sided_lora(o), adapters=True),
}
"""A new method is one line. ``one_sided_lora`` trains the adapters dual to ``relora``."""


def make_method(name: str, options: MethodOptions) -> Method:
    """The method called `name`.

    Raises:
      ValueError: For an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; use one of {', '.join(sorted(METHODS))}")
    return METHODS[name](options)
