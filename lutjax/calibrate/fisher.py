"""The empirical Fisher diagonal: mean squared per-sample gradients."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialized

from lutjax.arrays import MatrixView, is_compressed
from lutjax.arrays.split import explicit_mesh, typed_entries
from lutjax.calibrate.hashing import content_hash
from lutjax.calibrate.probe import ProbedArray
from lutjax.files import replace_file
from lutjax.paths import map_named, named_leaves
from lutjax.progress import progress_bar
from lutjax.transforms.importance import RowColumnMeans
from lutjax.transforms.quantize import leaves_with_rules, weight_view
from lutjax.transforms.recipe import Recipe, without_missing_embeddings

_SEPARATOR = "#"


@dataclasses.dataclass(frozen=True)
class Fisher(Mapping[str, Any]):
    """The Fisher diagonal of each path; hand it to :func:`lutjax.decompose`.

    Attributes:
      diagonals: For each path, :class:`RowColumnMeans` of the stored matrix, or an array of the
        weight's logical shape.
      samples: Number of samples that were averaged.
    """

    diagonals: dict[str, Any]
    samples: int

    def __getitem__(self, path: str) -> Any:
        """What is known about the parameter at ``path``."""
        return self.diagonals[path]

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self.diagonals)

    def __len__(self) -> int:
        """Number of paths."""
        return len(self.diagonals)

    def __repr__(self) -> str:
        """Number of parameters and samples."""
        return f"Fisher({len(self)} parameters, {self.samples} samples)"

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, at once."""
        _write(path, self.diagonals, {"samples": str(self.samples)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Fisher:
        """Reads what :meth:`save` wrote.

        Raises:
          ValueError: If the file is none.
        """
        values, metadata = _read(path)
        if "samples" not in metadata or "batches" in metadata:
            raise ValueError(f"{path} is not a finished Fisher file; let `fisher` finish first")
        return cls(values, int(metadata["samples"]))


def fisher(
    loss_fn: Callable[[Any, Any], Float[Array, ""]],
    params: Any,
    batches: Iterable[Any],
    *,
    recipe: Recipe | None = None,
    keep: Literal["means", "full"] = "means",
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 10,
    progress: bool = False,
) -> Fisher:
    r"""Averages the squared gradients of single samples.

    .. math:: F = \frac{1}{S} \sum_s \left( \frac{\partial \ell(W, x_s)}{\partial W} \right)^2

    Samples run one after the other, so one gradient is held at a time; with ``keep="means"`` each
    is reduced at once to row and column means. Compressed weights stay compressed: the gradient is
    that of the dense weight they stand for. Samples that are split over explicit mesh axes are
    gathered first.

    Args:
      loss_fn: Parameters and one sample to a scalar loss; for compressed parameters a function
        that runs on them, see :func:`lutjax.lift`.
      params: A pytree of dense or compressed parameters.
      batches: Pytrees of arrays with a leading axis of samples, for example ``int32[B, T]``.
      recipe: Which parameters, and along which axes; by default all matrices but embeddings, head
        and norms. Its configurations have no meaning here.
      keep: ``"means"`` of rows and columns, or the ``"full"`` diagonal.
      checkpoint: A file that keeps the sums so far; a later call with the same arguments goes on
        after the batches it has. It is deleted at the end.
      save_every: Batches between two checkpoints.
      progress: Show a progress bar.

    Returns:
      The averages in float32.

    Raises:
      ValueError: If there is no data, a loss or gradient is not finite, a rule matches nothing, the
        recipe reaches no matrix, or the checkpoint belongs to other weights or settings.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.3).

    >>> def loss(params, x):
    ...     return (x @ params["kernel"]).sum()
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> fisher(loss, params, [jnp.array([[1.0, 3.0]])])["kernel"].rows.tolist()
    [1.0, 9.0]
    """
    if keep not in ("means", "full"):
        raise ValueError(f"keep={keep!r} is unknown; use 'means' or 'full'")
    if save_every < 1:
        raise ValueError(f"save_every={save_every} must be at least 1")
    targets = _targets(params, Recipe.uniform() if recipe is None else recipe)
    leaves = dict(named_leaves(params))
    totals = {path: _zeros(target, leaves[path], keep) for path, target in targets.items()}
    done = samples = 0
    identity = ""
    if checkpoint is not None:
        weights = {path: leaf for path, leaf in leaves.items() if path in targets}
        described = f"{keep}{targets}{content_hash(weights)}"
        identity = hashlib.sha256(described.encode()).hexdigest()
        if Path(checkpoint).exists():
            totals, done, samples = _resume(checkpoint, identity, totals)
    step = _make_step(loss_fn, targets, keep)
    start = done
    for number, batch in enumerate(progress_bar(batches, "fisher", "batch", show=progress)):
        if number < start:
            continue
        count = _sample_count(batch)
        totals, losses = step(params, totals, batch)
        if not np.isfinite(np.asarray(losses)).all():
            raise ValueError(
                f"the loss of a sample in batch {number} is NaN or infinite; leave that batch out "
                f"or mend the model"
            )
        done, samples = number + 1, samples + count
        if checkpoint is not None and done % save_every == 0:
            metadata = {"samples": str(samples), "batches": str(done), "identity": identity}
            _write(checkpoint, totals, metadata)
    if samples == 0:
        raise ValueError("batches is empty; give at least one sample")
    values = jax.tree.map(lambda total: total / samples, totals)
    for path, value in values.items():
        if not all(np.isfinite(np.asarray(part)).all() for part in jax.tree.leaves(value)):
            raise ValueError(f"the squared gradient of {path!r} is NaN or infinite")
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return Fisher(values, samples)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A parameter to differentiate by: its logical shape and how its matrix is stored."""

    shape: tuple[int, ...]
    batch_ndim: int
    view: MatrixView
    compressed: bool

    def matrix(self, array: jax.Array) -> jax.Array:
        return self.view.to_matrix(array, self.batch_ndim)


def _targets(params: Any, recipe: Recipe) -> dict[str, _Target]:
    targets = {}
    recipe = without_missing_embeddings(recipe, (path for path, _ in named_leaves(params)))
    for path, leaf, rule in leaves_with_rules(recipe, params):
        if is_compressed(leaf):
            targets[path] = _Target(leaf.shape, len(leaf.batch_shape), leaf.view, True)
        elif jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2:
            targets[path] = _Target(leaf.shape, *weight_view(leaf.shape, rule, path), False)
    if not targets:
        raise ValueError("the recipe reaches no matrix; see Recipe.rule_for")
    return targets


def _probe(target: _Target, leaf: Any) -> jax.Array:
    """What to differentiate by: the weight, or zeros that are added to a compressed one."""
    if not target.compressed:
        return leaf
    return jnp.zeros((*leaf.batch_shape, *leaf.matrix_shape), jnp.float32)


def _squares(target: _Target, gradient: jax.Array, keep: str) -> Any:
    # Gradients of compressed weights come in stored form already.
    if keep == "full":
        logical = target.view.from_matrix(gradient) if target.compressed else gradient
        return jnp.square(logical.astype(jnp.float32))
    matrix = gradient if target.compressed else target.matrix(gradient)
    square = jnp.square(matrix.astype(jnp.float32))
    return RowColumnMeans(square.mean(axis=-1), square.mean(axis=-2))


def _zeros(target: _Target, leaf: Any, keep: str) -> Any:
    """The sum of no squares; with explicit axes sharded as what will be added to it."""
    mesh = explicit_mesh(leaf)

    def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
        device = None if mesh is None else NamedSharding(mesh, like.sharding.spec)
        return jnp.zeros(like.shape, like.dtype, device=device)

    found = jax.eval_shape(lambda leaf: _squares(target, _probe(target, leaf), keep), leaf)
    return jax.tree.map(zeros, found)


def _make_step(
    loss_fn: Callable, targets: dict[str, _Target], keep: str
) -> Callable[[Any, Any, Any], tuple[Any, jax.Array]]:
    @jax.jit
    def step(params: Any, totals: Any, batch: Any) -> tuple[Any, jax.Array]:
        leaves = {path: leaf for path, leaf in named_leaves(params) if path in targets}
        probes = {path: _probe(targets[path], leaf) for path, leaf in leaves.items()}

        def loss(probes: dict[str, jax.Array], sample: Any) -> jax.Array:
            def place(path, leaf):
                if path not in targets:
                    return leaf
                return ProbedArray(leaf, probes[path]) if is_compressed(leaf) else probes[path]

            return loss_fn(map_named(place, params), sample)

        def one(totals: Any, sample: Any) -> tuple[Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(probes, sample)
            new = {path: _squares(targets[path], g, keep) for path, g in gradients.items()}
            return jax.tree.map(jnp.add, totals, new), value

        return jax.lax.scan(one, totals, jax.tree.map(_whole_samples, batch))

    return step


def _whole_samples(array: jax.Array) -> jax.Array:
    """Samples that run one after the other cannot be split over an explicit axis."""
    mesh = explicit_mesh(array)
    if mesh is None:
        return array
    spec = PartitionSpec(None, *typed_entries(array)[1:])
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def _sample_count(batch: Any) -> int:
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or counts & {(), (0,)}:
        raise ValueError(
            f"a batch has leading axes {sorted(counts)}; all its arrays need the same number of "
            f"samples, at least one"
        )
    ((count,),) = counts
    return count


def _resume(path: str | os.PathLike, identity: str, zeros: Any) -> tuple[Any, int, int]:
    totals, metadata = _read(path)
    if metadata.get("identity") != identity:
        raise ValueError(
            f"{path} was made with other weights or settings; delete it, or name another checkpoint"
        )
    ordered = {name: jax.tree.map(jnp.add, zeros[name], totals[name]) for name in zeros}
    return ordered, int(metadata["batches"]), int(metadata["samples"])


def _write(path: str | os.PathLike, values: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors = {}
    for name, value in values.items():
        parts = value._asdict() if isinstance(value, RowColumnMeans) else {"full": value}
        for part, array in parts.items():
            tensors[f"{name}{_SEPARATOR}{part}"] = np.ascontiguousarray(array)
    # safetensors' save_file would keep others from reading it.
    replace_file(path, serialized(tensors, metadata))


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a Fisher file: {error}") from error
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        parameter, _, part = name.rpartition(_SEPARATOR)
        if part == "full":
            values[parameter] = array
        elif part == "rows":
            columns = arrays.get(f"{parameter}{_SEPARATOR}columns")
            if columns is None:
                raise ValueError(f"{path} has no column means for {parameter!r}")
            values[parameter] = RowColumnMeans(array, columns)
    return values, metadata
