"""The step of a finetuning run: gradients of a low-rank adapter on a frozen base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from lutjax.adapters import lora, multi
from lutjax.arrays import LowRankArray
from lutjax.models import Decoder


class Batch(NamedTuple):
    """Packed rows on the device, in A parts that are run one after the other.

    Attributes:
      tokens: `int32[A, B, T]`.
      segments: `int32[A, B, T]`, see `Decoder`.
      targets: `int32[A, B, M]`, what to predict, negative for nothing.
      at: `int32[A, B, M]`, the tokens along T to predict it at, for a language model; at each one
        if None. Logits take more room than all else, and no others are computed.
    """

    tokens: Int32[Array, "a b t"]
    segments: Int32[Array, "a b t"]
    targets: Int32[Array, "a b m"]
    at: Int32[Array, "a b m"] | None = None


class Trained(NamedTuple):
    """What is trained.

    Attributes:
      adapter: Low-rank parts by parameter path, in float32.
      head: `float32[D, C]`, from the last hidden state to the scores of classes; None for a
        language model.
    """

    adapter: dict[str, LowRankArray]
    head: Float32[Array, "d c"] | None = None


class TrainState(NamedTuple):
    """What training changes; the base is not among it."""

    trained: Trained
    optimizer: Any


class Sums(NamedTuple):
    """Sums over the tokens at which something is predicted.

    Attributes:
      loss: Cross-entropy in nats.
      targets: Number of these tokens.
      correct: Those of which the likeliest prediction is right; of n equally likely ones, 1 / n.
    """

    loss: Float32[Array, ""]
    targets: Float32[Array, ""]
    correct: Float32[Array, ""]


Objective = Callable[[Trained, Any, Batch], Sums]
"""(trained, base, one part of a batch) -> sums."""


class Step(NamedTuple):
    """The compiled functions of a run; `base` is an argument, so that nothing copies it.

    Attributes:
      update: (state, base, batch) -> (state, metrics); the state is donated.
      evaluate: (trained, base, batch) -> sums.
    """

    update: Callable[..., tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[..., Sums]


def next_token(apply_fn: Callable[..., Any]) -> Objective:
    """The objective of a language model.

    Args:
      apply_fn: The lifted `Decoder.apply`.
    """

    def objective(trained: Trained, base: Any, part: Batch) -> Sums:
        params = lora.attach(base, trained.adapter)
        logits = apply_fn(
            {"params": params}, part.tokens, segments=part.segments, logits_at=part.at
        )
        return _sums(logits, part.targets)

    return objective


def classification(hidden_fn: Callable[..., Any]) -> Objective:
    """The objective of a classifier, whose head has no bias.

    Args:
      hidden_fn: The lifted function that :func:`hidden_states` gives.
    """

    def objective(trained: Trained, base: Any, part: Batch) -> Sums:
        params = lora.attach(base, trained.adapter)
        hidden = hidden_fn({"params": params}, part.tokens, segments=part.segments)
        return _sums(hidden.astype(jnp.float32) @ trained.head, part.targets)

    return objective


def hidden_states(model: Decoder) -> Callable[..., Float[Array, "b t d"]]:
    """``model.apply`` up to the normalised last hidden state, without the head over the vocabulary.

    Under ``jit``, the head is not computed.
    """

    def apply(variables: Any, tokens: Array, *, segments: Array) -> Float[Array, "b t d"]:
        _, captured = model.apply(
            variables,
            tokens,
            segments=segments,
            capture_intermediates=lambda module, _: module.name == "norm",
            mutable=["intermediates"],
        )
        return captured["intermediates"]["norm"]["__call__"][0]

    return apply


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Step:
    """The functions of a run.

    The loss is the mean over all targets of the batch, however they are spread over parts and
    devices. With a mesh, each device of its axis ``data`` runs its own rows (so kernels see local
    arrays) and the gradients of what is trained, which are small, are summed.

    Args:
      objective: :func:`next_token` or :func:`classification`.
      optimizer: Of what is trained.
      mesh: With an axis ``data``; other axes are left to the compiler.
    """

    def loss_and_sums(trained: Trained, base: Any, part: Batch) -> tuple[Array, Sums]:
        sums = objective(trained, base, part)
        return sums.loss, sums

    def gradients(trained: Trained, base: Any, batch: Batch) -> tuple[Any, Sums]:
        """Sums over the parts of the batch."""
        whole = jax.grad(loss_and_sums, has_aux=True)
        return _over_parts(lambda part: whole(trained, base, part), batch)

    def sums(trained: Trained, base: Any, batch: Batch) -> Sums:
        return _over_parts(lambda part: objective(trained, base, part), batch)

    if mesh is not None:
        gradients, sums = (_over_data(fn, mesh) for fn in (gradients, sums))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, base: Any, batch: Batch) -> Any:
        gradient, (loss, count, _) = gradients(state.trained, base, batch)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": loss / count, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(trained, optimizer_state), metrics

    return Step(update, jax.jit(sums))


def state_for_each(
    adapter: dict[str, LowRankArray], optimizer: optax.GradientTransformation, count: int
) -> TrainState:
    """So many copies of an adapter on a leading axis, and the state of an optimiser for each."""
    trained = Trained(multi.batch([adapter] * count))
    return TrainState(trained, jax.vmap(optimizer.init)(trained))


def update_each(step: Step) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """``step.update`` for many adapters at once, with data and an optimiser state for each.

    They and the metrics have a leading axis. The base, which has none, is read once for all: its
    products see the rows of all batches.
    """
    return jax.jit(jax.vmap(step.update, in_axes=(0, None, 0)), donate_argnums=0)


def _sums(scores: Float[Array, "b t c"], targets: Int32[Array, "b t"]) -> Sums:
    real = targets >= 0
    wanted = jnp.where(real, targets, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, wanted)
    wanted_scores = jnp.take_along_axis(scores, wanted[..., None], axis=-1)[..., 0]
    best = scores.max(axis=-1)
    ties = jnp.sum(scores == best[..., None], axis=-1)
    correct = jnp.where(real & (wanted_scores == best), 1 / ties, 0.0)
    return Sums(
        jnp.where(real, losses, 0.0).sum(),
        real.sum().astype(jnp.float32),
        correct.sum().astype(jnp.float32),
    )


def _over_parts(fn: Callable[[Batch], Any], batch: Batch) -> Any:
    """The sum of ``fn(part)``, one part after the other."""
    first = jax.tree.map(lambda a: a[0], batch)
    if batch.tokens.shape[0] == 1:
        return fn(first)

    def add(total: Any, part: Batch) -> Any:
        return jax.tree.map(jnp.add, total, fn(part)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(fn, first))
    return jax.lax.scan(add, zero, batch)[0]


def _over_data(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Runs ``fn(trained, base, batch)`` on each device's rows and sums what it returns."""
    replicated, rows = PartitionSpec(), PartitionSpec(None, "data")

    def local(trained: Any, base: Any, batch: Batch) -> Any:
        return jax.lax.psum(fn(trained, base, batch), "data")

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(replicated, replicated, rows),
        out_specs=replicated,
        axis_names={"data"},
        check_vma=False,
    )
