"""Quantising block after block, each with the inputs that the quantised ones before it give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int32

from lutjax.calibrate.blocks import convert_blocks, convert_decoder
from lutjax.models.blockwise import BlockFn
from lutjax.models.config import DecoderConfig
from lutjax.transforms.quantize import match_rules, quantize_array
from lutjax.transforms.recipe import Recipe, Rule, without_embeddings


def quantize_decoder(
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokens: Int32[Array, "b t"],
    recipe: Recipe | None = None,
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Quantises a decoder such that its products change little on a text (GPTQ).

    :func:`quantize_blocks` on its blocks; what the recipe reaches besides is rounded as by
    :func:`lutjax.quantize`. The result has the same form, size and speed as that function's.

    Args:
      config: Of the decoder, without ``scan_layers``.
      params: Its dense parameters.
      tokens: ``int32[B, T]``, text like that which the model is for; the benchmark uses 16,000
        tokens.
      recipe: What to do with which weight; 4-bit NormalFloat in groups of 64 by default.
      batch_size: Sequences that run together.
      progress: Show a progress bar.

    Returns:
      The parameters, compressed where the recipe says so.

    Raises:
      ValueError: If the layers are stacked, a rule matches nothing, a configuration does not fit,
        or a weight or an activation is not finite.
      TypeError: If a rule reaches a leaf that is no floating-point matrix.

    Source: GPTQ (arXiv 2210.17323).

    >>> import jax, jax.numpy as jnp
    >>> from lutjax.models import Decoder
    >>> config = DecoderConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=16)
    >>> tokens = jnp.array([[1, 2, 3, 4, 5, 6]])
    >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    >>> small = quantize_decoder(config, params, tokens, Recipe.uniform(bits=4, group_size=32))
    >>> small["layers"]["0"]["mlp"]["up_proj"]["kernel"].bits
    4
    """
    plan = match_rules(recipe or Recipe.uniform(), params)
    return convert_decoder(
        config, params, tokens, plan, _rounded, batch_size=batch_size, progress=progress
    )


def quantize_blocks(
    fn: BlockFn | Mapping[str, BlockFn],
    blocks: Mapping[str, Any],
    x: Float[Array, "rows ..."],
    recipe: Recipe | None = None,
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Quantises blocks one after the other, with the inputs that the quantised ones before give.

    For each block the second moments of what enters its weights are measured, its weights are
    rounded such that their products change little (:func:`lutjax.quantize` with ``hessians``), and
    the block runs again for the inputs of the next one. So later blocks make up for earlier ones,
    and the memory is that of ``x`` and of one block.

    Args:
      fn: ``fn(block_params, x) -> y`` for every block, or one function for each by path; they are
        lifted. See :func:`lutjax.models.blockwise.decoder_blocks`.
      blocks: The dense parameters of each block by path, in order.
      x: The input of the first block; the output of one block is the input of the next.
      recipe: What to do with which weight, by full path; 4-bit NormalFloat by default.
      batch_size: Rows of ``x`` that run together.
      progress: Show a progress bar.

    Returns:
      The parameters of each block, compressed where the recipe says so.

    Raises:
      ValueError: If a rule matches nothing, a configuration does not fit, or a weight or an
        activation is not finite.
      TypeError: If a rule reaches a leaf that is no floating-point matrix.

    Source: GPTQ (arXiv 2210.17323).

    >>> import jax, jax.numpy as jnp
    >>> blocks = {"0": {"kernel": jnp.eye(32)}, "1": {"kernel": jnp.eye(32)}}
    >>> x = jax.random.normal(jax.random.key(0), (4, 32))
    >>> quantize_blocks(lambda p, x: x @ p["kernel"], blocks, x, Recipe.uniform(3, 32))["1"]
    {'kernel': LutArray(shape=(32, 32), float32, 3 bits, group_size=column, 480 B)}
    """
    plan = match_rules(without_embeddings(recipe), dict(blocks))
    return convert_blocks(fn, blocks, x, plan, _rounded, batch_size=batch_size, progress=progress)


def _rounded(path: str, weight: Array, rule: Rule, hessian: Array | None) -> Any:
    return quantize_array(weight, rule, path=path, hessian=hessian)
