"""Decomposing block after block, each with the inputs that the decomposed ones before it give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int32, PRNGKeyArray

from lutjax.calibrate.blocks import Convert, convert_blocks, convert_decoder
from lutjax.models.blockwise import BlockFn
from lutjax.models.config import DecoderConfig
from lutjax.paths import named_leaves
from lutjax.transforms.decompose import Method, check_decomposition, decompose_array
from lutjax.transforms.quantize import match_rules
from lutjax.transforms.recipe import Recipe, Rule, without_embeddings
from lutjax.transforms.svd import SvdMethod


def decompose_decoder(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens: Int32[Array, "b t"],
    recipe: Recipe,
    *,
    rank: int,
    method: Method = "lorc",
    key: PRNGKeyArray,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Decomposes a decoder such that its products change little on a text.

    :func:`decompose_blocks` on its blocks; what the recipe reaches besides is decomposed as by
    :func:`lutjax.decompose`. The result has the same form, size and speed as that function's.

    Args:
      config: Of the decoder, without ``scan_layers``.
      params: Its dense parameters.
      tokens: ``int32[B, T]``, text like that which the model is for.
      recipe: How to quantise which weight; an allocation plan is one.
      rank: As in :func:`lutjax.decompose`.
      method: As in :func:`lutjax.decompose`; each round of ``"lq"`` and ``"loftq"`` rounds with
        error feedback, which takes long.
      key: As in :func:`lutjax.decompose`.
      rounds: As in :func:`lutjax.decompose`.
      svd: As in :func:`lutjax.decompose`.
      batch_size: Sequences that run together.
      progress: Show a progress bar.

    Returns:
      The parameters, decomposed where the recipe says so.

    Raises:
      ValueError: If the layers are stacked, a rule matches nothing, the rank or a configuration
        does not fit, or a weight or an activation is not finite.
      TypeError: If a rule reaches a leaf that is no floating-point matrix.

    Source: CALDERA (arXiv 2405.18886), with the block-wise calibration of GPTQ (arXiv 2210.17323).

    >>> import jax, jax.numpy as jnp
    >>> from lutjax.models import Decoder
    >>> config = DecoderConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=16)
    >>> tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    >>> recipe = Recipe.uniform(bits=3, group_size=32)
    >>> small = decompose_decoder(config, params, tokens, recipe, rank=2, key=jax.random.key(0))
    >>> small["layers"]["0"]["mlp"]["up_proj"]["kernel"].parts[1].rank
    2
    """
    plan = match_rules(recipe, params)
    convert = _decomposed(plan, params, rank, method, key, rounds, svd)
    return convert_decoder(
        config, params, tokens, plan, convert, batch_size=batch_size, progress=progress
    )


def decompose_blocks(
    fn: BlockFn | Mapping[str, BlockFn],
    blocks: Mapping[str, Any],
    x: Float[Array, "rows ..."],
    recipe: Recipe,
    *,
    rank: int,
    method: Method = "lorc",
    key: PRNGKeyArray,
    rounds: int | None = None,
    svd: SvdMethod = "randomized",
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Decomposes blocks one after the other, with the inputs that the decomposed ones before give.

    Like :func:`lutjax.calibrate.quantize_blocks`, with :func:`lutjax.decompose` for each weight.

    Args:
      fn: As in :func:`lutjax.calibrate.quantize_blocks`.
      blocks: The dense parameters of each block by path, in order.
      x: The input of the first block; the output of one block is the input of the next.
      recipe: How to quantise which weight, by full path.
      rank: As in :func:`decompose_decoder`.
      method: As in :func:`decompose_decoder`.
      key: As in :func:`decompose_decoder`.
      rounds: As in :func:`decompose_decoder`.
      svd: As in :func:`decompose_decoder`.
      batch_size: Rows of ``x`` that run together.
      progress: Show a progress bar.

    Returns:
      The parameters of each block, decomposed where the recipe says so.

    Raises:
      ValueError: If a rule matches nothing, the rank or a configuration does not fit, or a weight
        or an activation is not finite.
      TypeError: If a rule reaches a leaf that is no floating-point matrix.

    >>> import jax, jax.numpy as jnp
    >>> blocks = {"0": {"kernel": jnp.eye(32)}, "1": {"kernel": jnp.eye(32)}}
    >>> x, key = jax.random.normal(jax.random.key(0), (4, 32)), jax.random.key(1)
    >>> recipe = Recipe.uniform(bits=3, group_size=32)
    >>> fn = lambda params, x: x @ params["kernel"]
    >>> decompose_blocks(fn, blocks, x, recipe, rank=1, key=key)["1"]["kernel"].parts[1].rank
    1
    """
    plan = match_rules(without_embeddings(recipe), dict(blocks))
    convert = _decomposed(plan, dict(blocks), rank, method, key, rounds, svd)
    return convert_blocks(fn, blocks, x, plan, convert, batch_size=batch_size, progress=progress)


def _decomposed(
    plan: Mapping[str, Rule],
    params: Any,
    rank: int,
    method: Method,
    key: PRNGKeyArray,
    rounds: int | None,
    svd: SvdMethod,
) -> Convert:
    """What decomposes one weight, after a check of all of them."""
    shapes = {path: leaf.shape for path, leaf in named_leaves(params) if path in plan}
    check_decomposition(
        {path: (shapes[path], rule) for path, rule in plan.items()},
        rank=rank,
        method=method,
        rounds=rounds,
        svd=svd,
    )

    def convert(path: str, weight: Array, rule: Rule, hessian: Array | None) -> Any:
        return decompose_array(
            weight,
            rule,
            rank=rank,
            method=method,
            key=key,
            hessian=hessian,
            rounds=rounds,
            svd=svd,
            path=path,
        ).array

    return convert
