"""Fisher information for the commands that weigh errors by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lutjax.calibrate import Fisher


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
    from lutjax.cli.models import evaluation_text, load_model
    from lutjax.evaluate import windows

    if file is None and text is None:
        return None
    if file is not None and file.exists():
        return Fisher.load(file)
    if text is None:
        raise FileNotFoundError(f"{file} does not exist; name a text with --text to make it from")
    loaded = load_model(model)
    ids = loaded.tokenizer.encode(evaluation_text(text), add_special_tokens=False)
    batches = [row[None] for row in windows(ids, window, samples)]
    running = None if file is None else file.with_name(file.name + ".running")
    result = fisher(
        next_token_loss(loaded.apply_fn), loaded.params, batches, checkpoint=running, progress=True
    )
    if file is not None:
        result.save(file)
    return result
