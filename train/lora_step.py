"""The step of a finetuning run: gradients of a low-rank adapter on a frozen base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32

from lutjax.adapters import lora
from lutjax.arrays import LowRankArray


class Batch(NamedTuple):
    """Packed rows on the device, in A parts that are run one after the other.

    Attributes:
      tokens: `int32[A, B, T]`.
      segments: `int32[A, B, T]`, see `Decoder`.
      learnt: `bool[A, B, T]`, tokens to predict.
    """

    tokens: Int32[Array, "a b t"]
    segments: Int32[Array, "a b t"]
    learnt: Bool[Array, "a b t"]


class TrainState(NamedTuple):
    """What training changes; the base is not among it.

    Attributes:
      adapter: Low-rank parts by parameter path, in float32.
      optimizer: The optimiser's state.
    """

    adapter: dict[str, LowRankArray]
    optimizer: Any


class Step(NamedTuple):
    """The compiled functions of a run; `base` is an argument, so that nothing copies it.

    Attributes:
      update: (state, base, batch) -> (state, metrics); the state is donated.
      evaluate: (adapter, base, batch) -> (summed loss in nats, number of tokens).
    """

    update: Callable[..., tuple[TrainState, dict[str, Array]]]
    evaluate: Callable[..., tuple[Array, Array]]


def make_step(
    apply_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Step:
    """The functions of a run.

    The loss is the mean over all learnt tokens of the batch, however they are spread over parts
    and devices. With a mesh, each device of its axis ``data`` runs its own rows (so kernels see
    local arrays) and the gradients of the adapter, which are small, are summed.

    Args:
      apply_fn: The lifted `Decoder.apply`.
      optimizer: Of the adapter.
      mesh: With an axis ``data``; other axes are left to the compiler.
    """

    def summed_loss(adapter: Any, base: Any, part: Batch) -> Array:
        params = lora.attach(base, adapter)
        logits = apply_fn({"params": params}, part.tokens, segments=part.segments)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part.tokens[:, 1:])
        return jnp.where(part.learnt[:, 1:], losses, 0.0).sum()

    def gradients(adapter: Any, base: Any, batch: Batch) -> Any:
        """Sums over the parts of the batch of the loss and its gradient."""
        whole = jax.value_and_grad(summed_loss)
        if batch.tokens.shape[0] == 1:
            return whole(adapter, base, jax.tree.map(lambda a: a[0], batch))

        def add(total: Any, part: Batch) -> Any:
            return jax.tree.map(jnp.add, total, whole(adapter, base, part)), None

        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(whole, adapter, base, _first(batch)))
        return jax.lax.scan(add, zero, batch)[0]

    def losses(adapter: Any, base: Any, batch: Batch) -> Array:
        return jax.lax.map(lambda part: summed_loss(adapter, base, part), batch).sum()

    if mesh is not None:
        gradients, losses = (_over_data(fn, mesh) for fn in (gradients, losses))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, base: Any, batch: Batch) -> Any:
        count = _count(batch)
        loss, gradient = gradients(state.adapter, base, batch)
        gradient = jax.tree.map(lambda g: g / count, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.adapter)
        adapter = optax.apply_updates(state.adapter, updates)
        metrics = {"loss": loss / count, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(adapter, optimizer_state), metrics

    @jax.jit
    def evaluate(adapter: Any, base: Any, batch: Batch) -> Any:
        return losses(adapter, base, batch), _count(batch)

    return Step(update, evaluate)


def _count(batch: Batch) -> Float32[Array, ""]:
    return batch.learnt[..., 1:].sum().astype(jnp.float32)


def _first(batch: Batch) -> Batch:
    return jax.tree.map(lambda a: a[0], batch)


def _over_data(fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Runs ``fn(adapter, base, batch)`` on each device's rows and sums what it returns."""
    replicated, rows = PartitionSpec(), PartitionSpec(None, "data")

    def local(adapter: Any, base: Any, batch: Batch) -> Any:
        return jax.lax.psum(fn(adapter, base, batch), "data")

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(replicated, replicated, rows),
        out_specs=replicated,
        axis_names={"data"},
        check_vma=False,
    )
