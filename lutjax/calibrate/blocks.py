"""Compressing block after block, each with the inputs that the compressed ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from lutjax.calibrate.hessians import hessians
from lutjax.lift import lift
from lutjax.models.blockwise import BlockFn, decoder_blocks, functions_by_block
from lutjax.models.config import DecoderConfig
from lutjax.paths import map_named, named_leaves
from lutjax.progress import progress_bar
from lutjax.transforms.recipe import LutConfig, Recipe, Rule

Convert = Callable[[str, Array, Rule, Float[Array, "*batch k k"] | None], Any]
"""(path, weight, rule, second moments of its inputs) -> the compressed weight."""


def convert_decoder(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens: Int32[Array, "b t"],
    plan: Mapping[str, Rule],
    convert: Convert,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Converts the blocks of a decoder, and what the plan reaches besides without second moments.

    Args:
      config: Of the decoder, without ``scan_layers``.
      params: Its dense parameters.
      tokens: ``int32[B, T]``, text like that which the model is for.
      plan: The rule of each path.
      convert: What to do with a weight.
      batch_size: Sequences that run together.
      progress: Show a progress bar.
    """
    fns, blocks, x = decoder_blocks(config, params, tokens)
    done = convert_blocks(fns, blocks, x, plan, convert, batch_size=batch_size, progress=progress)
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    rest = _convert(rest, plan, convert, {})
    return rest | {"layers": {path.removeprefix("layers/"): done[path] for path in done}}


def convert_blocks(
    fn: BlockFn | Mapping[str, BlockFn],
    blocks: Mapping[str, Any],
    x: Float[Array, "rows ..."],
    plan: Mapping[str, Rule],
    convert: Convert,
    *,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Converts blocks one after the other, with the inputs that the converted ones before give.

    For each block the second moments of what enters its weights are measured, its weights are
    converted, and the block runs again for the inputs of the next one. So later blocks make up for
    earlier ones, and the memory is that of ``x`` and of one block.

    Args:
      fn: ``fn(block_params, x) -> y`` for every block, or one for each by path; it is lifted.
      blocks: The dense parameters of each block by path, in order.
      x: The input of the first block; the output of one block is the input of the next.
      plan: The rule of each full path.
      convert: What to do with a weight.
      batch_size: Rows of ``x`` that run together.
      progress: Show a progress bar.

    Raises:
      ValueError: If ``batch_size`` is not from 1 to the rows of ``x``.
    """
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size={batch_size} must be from 1 to the {len(x)} rows of x")
    batches = [x[start : start + batch_size] for start in range(0, len(x), batch_size)]
    fns = functions_by_block(fn, blocks)
    runs = {each: jax.jit(lift(each)) for each in set(fns.values())}
    done: dict[str, Any] = {}
    for path, params in progress_bar(blocks.items(), "compress", "block", show=progress):
        full = {name: "/".join(filter(None, (path, name))) for name, _ in named_leaves(params)}
        rules = {name: plan[whole] for name, whole in full.items() if whole in plan}
        done[path] = params
        if rules:
            # Blocks are observed alike, whatever their configurations, and so compiled once.
            alike = (Rule(n, LutConfig(), r.axis, r.batch_ndim) for n, r in rules.items())
            found = hessians(fns[path], params, batches, recipe=Recipe(tuple(alike)))
            # A block may be one matrix; its name within the block is empty then.
            moments = {full[name]: hessian for name, hessian in found.items()}
            done[path] = _convert({path: params}, plan, convert, moments)[path]
        batches = [runs[fns[path]](done[path], batch) for batch in batches]
    return done


def _convert(
    params: Any, plan: Mapping[str, Rule], convert: Convert, moments: Mapping[str, Array]
) -> Any:
    def one(path: str, leaf: Any) -> Any:
        return convert(path, leaf, plan[path], moments.get(path)) if path in plan else leaf

    return map_named(one, params)
