"""`load`: any supported dense checkpoint as (model, params, tokenizer)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lutjax.io.checkpoint import Checkpoint, nest, open_gguf
from lutjax.io.gguf import GGUFReader
from lutjax.io.huggingface import download, is_hub_id, open_directory, refuse_pickle
from lutjax.io.tokenizer import Tokenizer
from lutjax.models.decoder import Decoder


def load(
    path: str | Path, dtype: DTypeLike = jnp.float32, *, check_finite: bool = True
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
    """Loads a pretrained causal language model.

    `model.apply({"params": params}, tokens)` takes int32 `[batch, time]` and returns float32
    logits `[batch, time, vocab]`.

    Args:
      path: a directory with config.json and safetensors, a GGUF file, or a hub id (owner/name).
      dtype: dtype of the parameters and of the activations.
      check_finite: whether a weight with NaN or Inf is an error.

    Returns:
      The model, its parameters, and its tokenizer (None if the directory has no tokenizer.json).

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound or not supported.
    """
    checkpoint = open_checkpoint(path, check_finite=check_finite)
    tokenizer = load_tokenizer(checkpoint)
    model = Decoder(dataclasses.replace(checkpoint.config, dtype=dtype))
    return model, load_params(checkpoint, dtype), tokenizer


def open_checkpoint(path: str | Path, *, check_finite: bool = True) -> Checkpoint:
    """Opens a dense checkpoint of any supported kind, reading headers only.

    Args:
      path: a directory, a GGUF file, or a hub id.
      check_finite: whether reading a weight with NaN or Inf is an error.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound or not supported.
    """
    local = Path(path)
    if local.is_dir():
        return open_directory(local, check_finite=check_finite)
    if local.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise refuse_pickle(local)
    if local.suffix == ".gguf":
        return open_gguf(local, check_finite=check_finite)
    if local.exists():
        raise ValueError(
            f"{path} is neither a directory nor a .gguf file; for safetensors name the directory "
            "that also holds config.json"
        )
    if is_hub_id(str(path)):
        return open_directory(download(str(path)), check_finite=check_finite)
    raise FileNotFoundError(f"{path} does not exist")


def load_params(checkpoint: Checkpoint, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Reads all parameters, one at a time, as a nested dictionary of arrays.

    Args:
      checkpoint: an opened checkpoint.
      dtype: dtype of the parameters.

    Returns:
      The parameters of the unrolled decoder.

    Raises:
      ValueError: if a file is truncated or a weight holds NaN or Inf.
    """
    target = jnp.dtype(dtype)
    return nest(
        {
            path: jax.device_put(np.ascontiguousarray(value.astype(target, copy=False)))
            for path, value in checkpoint.parameters()
        }
    )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer that belongs to a checkpoint.

    Args:
      checkpoint: an opened checkpoint.

    Returns:
      The tokenizer, or None if a directory has no tokenizer.json.

    Raises:
      ValueError: if it is of an unsupported kind.
    """
    if isinstance(checkpoint.reader, GGUFReader):
        return Tokenizer.from_gguf(checkpoint.reader.metadata, str(checkpoint.source))
    if (checkpoint.source / "tokenizer.json").is_file():
        return Tokenizer.from_directory(checkpoint.source)
    return None
