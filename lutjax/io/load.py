"""`load`: any supported checkpoint as (model, params, tokenizer)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lutjax.arrays import is_compressed
from lutjax.io.checkpoint import Checkpoint, nest, open_gguf
from lutjax.io.compressed import CompressedCheckpoint, is_compressed_directory, open_compressed
from lutjax.io.gguf import GGUFReader
from lutjax.io.grid import grid_array, kept_paths
from lutjax.io.huggingface import download, is_hub_id, open_directory, refuse_pickle
from lutjax.io.tokenizer import Tokenizer, can_rebuild
from lutjax.models.decoder import Decoder


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    *,
    keep_quantized: bool = False,
    allow_nonfinite: bool = False,
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
    """Loads a pretrained causal language model, dense or compressed.

    `model.apply({"params": params}, tokens)` takes int32 `[batch, time]` and returns float32
    logits `[batch, time, vocab]`; with compressed parameters, `lutjax.lift(model.apply)` does.

    Args:
      path: a directory with config.json and safetensors, dense or quantised; one that `lutjax.save`
        or `compress_checkpoint` wrote; a GGUF file; or a hub id (owner/name) of such a directory.
      dtype: dtype of the parameters and of the activations; by default float32 for a dense
        checkpoint and what was saved for a compressed one. On CPUs, float32 is several times as
        fast for a compressed one whose embeddings stayed in bfloat16.
      keep_quantized: load matrices that are quantised already as `LutArray`s that stand for the
        same values bit for bit, instead of dequantising them: GGUF's block types, and directories
        of GPTQ, AWQ, bitsandbytes, compressed-tensors, Model Optimizer, FP8 and MXFP4
        (docs/checkpoints.md).
      allow_nonfinite: whether a weight may have NaN and Inf; it is an error otherwise.

    Returns:
      The model, its parameters, and its tokenizer (None if the directory has no tokenizer.json).

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound or not supported, or `keep_quantized` has nothing
        to keep.
    """
    directory = _local_directory(path)
    if directory is not None and is_compressed_directory(directory):
        if keep_quantized:
            raise ValueError(
                f"keep_quantized: {path} holds lutjax's own compressed weights, which stay so "
                "without it"
            )
        return _load_compressed(open_compressed(directory, allow_nonfinite=allow_nonfinite), dtype)
    checkpoint = open_checkpoint(directory or path, allow_nonfinite=allow_nonfinite)
    tokenizer = load_tokenizer(checkpoint)
    dtype = jnp.float32 if dtype is None else dtype
    model = Decoder(dataclasses.replace(checkpoint.config, dtype=dtype))
    return model, load_params(checkpoint, dtype, keep_quantized=keep_quantized), tokenizer


def open_checkpoint(path: str | Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Opens a dense checkpoint of any supported kind, reading headers only.

    Args:
      path: a directory, a GGUF file, or a hub id.
      allow_nonfinite: whether a weight may have NaN and Inf; reading it is an error otherwise.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound or not supported.
    """
    directory = _local_directory(path)
    if directory is None:
        return open_gguf(path, allow_nonfinite=allow_nonfinite)
    if is_compressed_directory(directory):
        return _open_saved(directory, allow_nonfinite)
    return open_directory(directory, allow_nonfinite=allow_nonfinite)


def _open_saved(directory: Path, allow_nonfinite: bool) -> Checkpoint:
    """A directory that `lutjax.save` wrote, if nothing in it is compressed."""
    saved = open_compressed(directory, allow_nonfinite=allow_nonfinite)
    if any(is_compressed(saved.abstract(path)) for path in saved.descriptions):
        raise ValueError(
            f"{directory} holds compressed weights already; a dense checkpoint is needed"
        )
    if saved.config is None or saved.config.scan_layers:
        what = "no decoder" if saved.config is None else "stacked layers"
        raise ValueError(f"{directory} holds {what}; save an unrolled decoder with its config")
    return Checkpoint.create(
        directory, saved.config, "lutjax", saved.reader, allow_nonfinite=allow_nonfinite
    )


def load_params(
    checkpoint: Checkpoint, dtype: DTypeLike = jnp.float32, *, keep_quantized: bool = False
) -> dict[str, Any]:
    """Reads all parameters, one at a time, as a nested dictionary of arrays.

    Args:
      checkpoint: an opened checkpoint.
      dtype: dtype of the parameters.
      keep_quantized: whether matrices that are quantised already stay so.

    Returns:
      The parameters of the unrolled decoder.

    Raises:
      ValueError: if a file is truncated, a weight holds NaN or Inf, or there is nothing to keep.
    """
    kept = kept_paths(checkpoint, keep_quantized)
    target = jnp.dtype(dtype)

    def leaf(path: str) -> Any:
        if path in kept:
            return grid_array(checkpoint, path).astype(target)
        value = checkpoint.read(path).astype(target, copy=False)
        return jax.device_put(np.ascontiguousarray(value))

    return nest({path: leaf(path) for path in checkpoint.shapes})


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer that belongs to a checkpoint.

    Args:
      checkpoint: an opened checkpoint.

    Returns:
      The tokenizer, or None if a directory has no tokenizer.json. Where a GGUF file has one that
      cannot be rebuilt (SentencePiece, as Gemma has, or a pre-tokenizer that is unknown or not
      named), that of a tokenizer.json beside the file.

    Raises:
      ValueError: if it is of an unsupported kind, or the tokenizer.json is another model's.
    """
    if isinstance(checkpoint.reader, GGUFReader):
        path, metadata = checkpoint.source, checkpoint.reader.metadata
        if can_rebuild(metadata) or not (path.parent / "tokenizer.json").is_file():
            return Tokenizer.from_gguf(metadata, str(path))
        return Tokenizer.beside_gguf(path, metadata)
    return _directory_tokenizer(checkpoint.source)


def _directory_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory, if it has one."""
    has_one = (directory / "tokenizer.json").is_file()
    return Tokenizer.from_directory(directory) if has_one else None


def _local_directory(path: str | Path) -> Path | None:
    """The directory that `path` names, downloaded if it is a hub id; None if it is a GGUF file."""
    local = Path(path)
    if local.is_dir():
        return local
    if local.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise refuse_pickle(local)
    if local.suffix == ".gguf":
        return None
    if local.exists():
        raise ValueError(
            f"{path} is neither a directory nor a .gguf file; for safetensors name the directory "
            "that also holds config.json"
        )
    if is_hub_id(str(path)):
        return download(str(path))
    raise FileNotFoundError(f"{path} does not exist")


def _load_compressed(
    checkpoint: CompressedCheckpoint, dtype: DTypeLike | None
) -> tuple[Decoder, dict[str, Any], Tokenizer | None]:
    if checkpoint.config is None:
        raise ValueError(
            f"{checkpoint.source} was saved without a configuration; read it with "
            "lutjax.io.read_params"
        )
    config, parameters = checkpoint.config, checkpoint.parameters()
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
        target = jnp.dtype(dtype)
        parameters = ((path, leaf.astype(target)) for path, leaf in parameters)
    tokenizer = _directory_tokenizer(checkpoint.source)
    return Decoder(config), nest(dict(parameters)), tokenizer
