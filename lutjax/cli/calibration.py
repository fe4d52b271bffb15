"""What the commands make of a text to calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lutjax.calibrate import Fisher
    from lutjax.models import DecoderConfig


def fisher_for(
    model: str, file: Path | None, text: Path | None, samples: int, window: int
) -> Fisher | None:
    """Reads Fisher information, or makes it from a text if the file is not there yet.

    Args:
      model: the model that it is about.
      file: where it is kept; None for nowhere.
      text: a UTF-8 text to make it from; None to only read.
      samples: windows of the text to use.
      window: tokens in each.

    Returns:
      The row and column means, or None if neither a file nor a text is given.

    Raises:
      FileNotFoundError: if the file is missing and there is no text to make it from.
    """
    from lutjax.calibrate import Fisher, fisher, next_token_loss
    from lutjax.cli.models import evaluation_text, load_model, text_windows

    if file is None and text is None:
        return None
    if file is not None and file.exists():
        return Fisher.load(file)
    if text is None:
        raise FileNotFoundError(f"{file} does not exist; name a text with --text to make it from")
    loaded = load_model(model)
    rows = text_windows(evaluation_text(text), loaded.tokenizer, loaded.config, window, samples)
    batches = [row[None] for row in rows]
    running = None if file is None else file.with_name(file.name + ".running")
    result = fisher(
        next_token_loss(loaded.apply_fn), loaded.params, batches, checkpoint=running, progress=True
    )
    if file is not None:
        result.save(file)
    return result


def compress_on_text(
    model: str,
    output: Path,
    text: Path,
    samples: int,
    window: int,
    compress: Callable[[DecoderConfig, Any, Any], Any],
) -> None:
    """Compresses a model with a text at hand, all of it in memory, and saves it.

    Args:
      model: directory, .gguf file or hub id of the dense model.
      output: directory to make; nothing may be there.
      text: a UTF-8 text to calibrate on.
      samples: windows of the text to use.
      window: tokens in each.
      compress: `compress(config, params, tokens)` gives the compressed parameters.

    Raises:
      FileExistsError: if something is at `output`.
      ValueError: if the model has no tokenizer.
    """
    import jax.numpy as jnp

    from lutjax import save
    from lutjax.cli.models import evaluation_text, text_windows
    from lutjax.io import load_params, load_tokenizer, open_checkpoint, require_tokenizer
    from lutjax.io.new_directory import check_destination
    from lutjax.paths import map_named

    check_destination(output)
    checkpoint = open_checkpoint(model)
    tokenizer = require_tokenizer(load_tokenizer(checkpoint), model)
    rows = text_windows(evaluation_text(text), tokenizer, checkpoint.config, window, samples)
    tokens = jnp.asarray(rows)
    params = compress(checkpoint.config, load_params(checkpoint), tokens)
    # What stays dense is stored as it was.
    params = map_named(lambda path, leaf: leaf.astype(checkpoint.abstract(path).dtype), params)
    save(output, params, checkpoint.config, tokenizer)
