"""What the commands share: a model ready to run, and the text it is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int32

    from lutjax.io import Tokenizer
    from lutjax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class RunnableModel:
    """A model with its tokenizer.

    Attributes:
      config: the decoder's configuration.
      params: dense and compressed parameters.
      tokenizer: text to tokens and back.
      apply_fn: the function to call with `{"params": params}`; the same object each time.
    """

    config: DecoderConfig
    params: Any
    tokenizer: Tokenizer
    apply_fn: Callable[..., Any]


def load_model(
    path: str, *, keep_quantized: bool = False, dtype: str | None = None
) -> RunnableModel:
    """Loads a model of any supported kind, and lifts it if its weights are compressed.

    On CPUs, what is dense and narrower than the activations gets their dtype unless another one is
    asked for: XLA would convert it again for every product.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound, not supported, or without a tokenizer.
    """
    import jax
    import jax.numpy as jnp

    import lutjax
    from lutjax.io import require_tokenizer
    from lutjax.paths import map_named

    model, params, tokenizer = lutjax.load(path, dtype, keep_quantized=keep_quantized)
    tokenizer = require_tokenizer(tokenizer, path)
    if dtype is None and jax.default_backend() == "cpu":
        target = jnp.dtype(model.config.dtype)

        def widened(_: str, leaf: Any) -> Any:
            narrower = jnp.finfo(leaf.dtype).bits < jnp.finfo(target).bits
            return leaf.astype(target) if narrower else leaf

        params = map_named(widened, params)
    return RunnableModel(model.config, params, tokenizer, lifted_if_needed(model.apply, params))


def for_inference(model: RunnableModel) -> RunnableModel:
    """The same model with joined projections and prepacked weights.

    Its blocks are replaced in the dictionary that holds them, one after the other, so that no two
    copies of all weights are held: the given model is used up.
    """
    from lutjax import fuse_projections, prepack

    blocks = {"layers": model.params} if model.config.scan_layers else model.params["layers"]
    for name, block in blocks.items():
        blocks[name] = prepack(fuse_projections(block))
    if model.config.scan_layers:
        return dataclasses.replace(model, params=blocks["layers"])
    rest = {name: part for name, part in model.params.items() if name != "layers"}
    return dataclasses.replace(model, params=prepack(rest) | {"layers": blocks})


def lifted_if_needed(apply_fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """`apply_fn` itself for dense parameters, lifted for compressed ones and those of experts."""
    from lutjax import lift
    from lutjax.arrays import has_compressed
    from lutjax.paths import named_leaves

    experts = any("/experts/" in path for path, _ in named_leaves(params))
    return lift(apply_fn) if experts or has_compressed(params) else apply_fn


def text_windows(
    text: str, tokenizer: Tokenizer, config: DecoderConfig, window: int, count: int
) -> Int32[np.ndarray, "count window"]:
    """Evenly spaced windows of a text; each begins with BOS if the model expects one.

    Args:
      text: the whole text.
      tokenizer: the model's.
      config: the model's.
      window: tokens in a window, BOS included.
      count: how many windows; all if the text has fewer.

    Returns:
      int32 `[count, window]`.

    Raises:
      ValueError: if the text is shorter than a window, or a window is longer than the context.
    """
    import numpy as np

    from lutjax.evaluate import windows

    if window > config.max_position_embeddings:
        raise ValueError(
            f"--window {window} is more than the {config.max_position_embeddings} tokens of "
            "context that the model has; use a smaller one"
        )
    begin = tokenizer.encode("")[:1]
    if begin and tokenizer.decode(begin, skip_special_tokens=False) != tokenizer.bos_token:
        begin = []
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) + len(begin) < window:
        raise ValueError(
            f"the text has {len(ids) + len(begin)} tokens, fewer than --window {window}; give a "
            "longer text with --text, or a smaller window"
        )
    rows = windows(ids, window - len(begin), count)
    first = np.broadcast_to(np.array(begin, np.int32), (len(rows), len(begin)))
    return np.concatenate([first, rows], axis=1)


def evaluation_text(path: Path | None = None) -> str:
    """The text of a UTF-8 file; by default Python's own help topics, about 465,000 characters.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    from lutjax.files import read_utf8

    return read_utf8(path)
