"""Greedy block-wise allocation of sparsity."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, GatedArray
from lutjax.calibrate.activations import ActivationQuantiles, projections, row_norms
from lutjax.calibrate.hashing import content_hash
from lutjax.files import json_by_line, replace_file
from lutjax.lift import lift
from lutjax.models.blockwise import BlockFn, functions_by_block
from lutjax.paths import map_named, named_leaves
from lutjax.progress import progress_bar

_FORMAT = "lutjax greedy sparsity search 2"
_MOST = 0.99  # a projection that ignores everything is no projection


@dataclasses.dataclass(frozen=True)
class BlockSearch:
    """The path of one block from no sparsity upwards.

    Attributes:
      shares: For each projection, its share of the block's weights.
      raised: The projection that each step raised.
      errors: The relative error of the block's output after each step: ‖y' − y‖ / ‖y‖ of a token,
        root mean square over tokens.
    """

    shares: Mapping[str, float]
    raised: tuple[str, ...]
    errors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class GreedySearch:
    """The paths of all blocks: every target up to the last step can be read off.

    Attributes:
      step: What a step adds to the sparsity of a block.
      inputs: Fingerprint of the parameters, inputs and histograms that were searched.
      blocks: By path of the block.
    """

    step: float
    inputs: str
    blocks: Mapping[str, BlockSearch]

    def sparsities(self, target: float) -> dict[str, float]:
        """The sparsity of each projection's path where the blocks reach ``target``.

        Between two steps, the next raise counts in part.

        Raises:
          ValueError: If a block's path ends before.
        """
        found: dict[str, float] = {}
        for path, block in self.blocks.items():
            steps = target / self.step
            if steps > len(block.raised) + 1e-9:
                raise ValueError(
                    f"target={target} is beyond the search of {path!r}, which ends at "
                    f"{self.step * len(block.raised):.2f}; search further, "
                    f"or in smaller steps"
                )
            levels = dict.fromkeys(block.shares, 0.0)
            for place, name in enumerate(block.raised):
                part = min(1.0, max(0.0, steps - place))
                levels[name] += part * self.step / block.shares[name]
            found |= {f"{path}/{name}": level for name, level in levels.items()}
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, a line for each block, at once."""
        header = {"format": _FORMAT, "step": self.step, "inputs": self.inputs}
        blocks = {name: dataclasses.asdict(block) for name, block in self.blocks.items()}
        replace_file(path, json_by_line(header, "blocks", blocks))

    @classmethod
    def load(cls, path: str | os.PathLike) -> GreedySearch:
        """Reads what :meth:`save` wrote.

        Raises:
          ValueError: If the file is none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r}")
            blocks = {
                name: BlockSearch(b["shares"], tuple(b["raised"]), tuple(b["errors"]))
                for name, b in data["blocks"].items()
            }
            return cls(data["step"], data["inputs"], blocks)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no greedy search: {error}") from error


def greedy_search(
    fn: BlockFn | Mapping[str, BlockFn],
    blocks: Mapping[str, Any],
    x: jax.Array,
    quantiles: ActivationQuantiles,
    *,
    limit: float,
    step: float = 0.005,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> GreedySearch:
    """Raises, step by step, the projection whose raise hurts the block's output least.

    From no sparsity, a step raises one projection of a block by ``step / share``, share being its
    part of the block's weights, so every step costs the block the same number of weights. The
    projection whose raise leaves the smallest error of the block's output keeps it. Blocks get the
    inputs that the dense model gives them. Every token counts by its relative error: the first
    token of a text can be a hundred times as large as all others together.

    What a raise adds to the squared error is kept, and computed anew only while it is the smallest
    known (lazy evaluation): it hardly falls when other projections are raised. Large steps treat
    small projections badly, since ``step / share`` is large for them.

    Args:
      fn: ``fn(block_params, x) -> y`` for every block, or one function for each by path; they are
        lifted. See :func:`lutjax.models.blockwise.decoder_blocks`.
      blocks: The parameters of each block by path, in order.
      x: The input of the first block; the output of one block is the input of the next.
      quantiles: Histograms for every projection, by full path.
      limit: The sparsity to stop at, in (0, 1).
      step: The sparsity that a step adds to a block.
      cache: A file that keeps the blocks that are done; a later call goes on from it.
      progress: Show a progress bar.

    Returns:
      The path of every block.

    Raises:
      ValueError: If limit or step are out of range, the file was made with another step, other
        blocks, inputs or histograms, or the quantiles are those of another model.

    Source: TEAL (arXiv 2408.14690, algorithm 1).
    """
    if not 0 < step <= limit < 1:
        raise ValueError(f"step={step} and limit={limit} must satisfy 0 < step <= limit < 1")
    for path, params in blocks.items():
        for name in projections(params):
            if f"{path}/{name}" not in quantiles:
                raise ValueError(f"the calibration has no quantiles for '{path}/{name}'")
    done: dict[str, BlockSearch] = {}
    counts = {path: quantiles[path].counts for path in sorted(quantiles)}
    inputs = content_hash((dict(blocks), x, counts))
    if cache is not None and Path(cache).exists():
        before = GreedySearch.load(cache)
        if before.step != step:
            raise ValueError(f"{cache} was made with step={before.step}; delete it, or use that")
        if before.inputs != inputs:
            raise ValueError(
                f"{cache} was made for other parameters, inputs or histograms; use another file"
            )
        done = dict(before.blocks)
    steps = math.ceil(limit / step - 1e-9)
    fns = functions_by_block(fn, blocks)
    runs = {each: jax.jit(lift(each)) for each in set(fns.values())}
    for path, params in progress_bar(blocks.items(), "greedy", "block", show=progress):
        y = runs[fns[path]](params, x)
        if len(getattr(done.get(path), "raised", ())) < steps:
            done[path] = _search_block(fns[path], path, params, x, y, quantiles, step, steps)
            if cache is not None:
                GreedySearch(step, inputs, done).save(cache)
        x = y
    return GreedySearch(step, inputs, {path: done[path] for path in blocks})


def _search_block(
    fn: Callable,
    path: str,
    params: Any,
    x: jax.Array,
    y: jax.Array,
    quantiles: ActivationQuantiles,
    step: float,
    steps: int,
) -> BlockSearch:
    wraps = projections(params)
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(params) if name in wraps}
    shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    weights = {name: wraps[name](leaf) for name, leaf in named_leaves(params) if name in wraps}
    norms = {n: row_norms(w) if quantiles.score == "wina" else None for n, w in weights.items()}

    def error(levels: Mapping[str, float]) -> float:
        thresholds = {
            name: quantiles[f"{path}/{name}"].threshold(level).astype(np.float32)
            for name, level in levels.items()
        }
        return float(_error(fn, params, weights, norms, thresholds, x, y))

    levels = dict.fromkeys(shares, 0.0)
    growth = dict.fromkeys(shares, 0.0)  # of the squared error by the next raise, as last seen
    raised: list[str] = []
    errors: list[float] = []
    for _ in range(steps):
        tried: dict[str, float] = {}
        options = [name for name in shares if levels[name] + step / shares[name] <= _MOST]
        while options and (best := min(options, key=growth.__getitem__)) not in tried:
            tried[best] = error({**levels, best: levels[best] + step / shares[best]})
            growth[best] = tried[best] ** 2 - (errors[-1] ** 2 if errors else 0.0)
        if not options:
            break
        levels[best] += step / shares[best]
        raised.append(best)
        errors.append(tried[best])
    return BlockSearch(shares, tuple(raised), tuple(errors))


@functools.partial(jax.jit, static_argnums=0)
def _error(
    fn: Callable,
    params: Any,
    weights: dict[str, CompressedArray],
    norms: dict[str, jax.Array | None],
    thresholds: dict[str, jax.Array],
    x: jax.Array,
    y: jax.Array,
) -> jax.Array:
    """The relative error of the block's output, root mean square over tokens that have one."""

    def gate(name, leaf):
        if name not in weights:
            return leaf
        return GatedArray(weights[name], thresholds[name], norms[name])

    gated = map_named(gate, params)
    error = jnp.linalg.norm((lift(fn)(gated, x) - y).astype(jnp.float32), axis=-1)
    size = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    relative = jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0)
    count = jnp.sum(size > 0, dtype=jnp.float32)
    return jnp.sqrt(jnp.sum(relative**2) / jnp.maximum(count, 1))
