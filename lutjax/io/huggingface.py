"""Hugging Face checkpoints: a directory, or an id on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lutjax.io import modelopt
from lutjax.io.checkpoint import Checkpoint
from lutjax.io.compressed import METADATA_NAME
from lutjax.io.configs import TEXT_PREFIX, config_from_hf
from lutjax.io.experts import ExpertsReader
from lutjax.io.gpt_oss import GptOssReader, check_quantization
from lutjax.io.quantized import QuantizedReader, method_from_config
from lutjax.io.readers import TensorReader
from lutjax.io.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsReader,
    read_index,
    read_json,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    METADATA_NAME,
    modelopt.CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
)
"""Whole paths, as a repository may hold the weights again in other formats and folders."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def open_directory(directory: str | Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Opens a directory with config.json and safetensors; only headers are read.

    Weights that GPTQ, AWQ, bitsandbytes (4 bits), compressed-tensors or Model Optimizer quantised,
    FP8, and MXFP4 (gpt-oss), are dequantised when they are read, or read as codes; of those, JSON
    objects that bitsandbytes keeps in tensors, and biases that the decoder has no place for, are
    read here as well. Of a model of text and images (`gemma3`), the text model is opened.

    Args:
      directory: its path.
      allow_nonfinite: whether a parameter may have NaN and Inf; reading it is an error otherwise.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if config.json or the weights are missing.
      ValueError: if the architecture or the quantisation is not supported, the weights are
        pickled, or a file is not sound.
    """
    directory = Path(directory)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json")
    data = read_json(config_path)
    config = config_from_hf(data, str(config_path))
    quantization, source = data.get("quantization_config"), str(config_path)
    if not quantization:
        quantization, source = _modelopt_config(directory), str(directory / modelopt.CONFIG_NAME)
    gpt_oss = config.model_type == "gpt_oss"
    method = None
    if quantization and gpt_oss:
        check_quantization(quantization, source)
    elif quantization:
        method = method_from_config(quantization, source)
    if not (directory / INDEX_NAME).is_file() and not (directory / SINGLE_NAME).is_file():
        pickles = [file.name for pattern in _PICKLES for file in directory.glob(pattern)]
        if pickles:
            raise refuse_pickle(directory / pickles[0])
        raise FileNotFoundError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    tensors = SafetensorsReader.open_directory(directory)
    if (model_type := data.get("model_type")) in TEXT_PREFIX:
        tensors = tensors.below(TEXT_PREFIX[model_type])
    reader: TensorReader = tensors if method is None else QuantizedReader(tensors, method)
    if gpt_oss:
        reader = GptOssReader(tensors, str(directory))
    elif config.num_experts is not None:
        reader = ExpertsReader(reader, config.num_experts, str(directory))
    return Checkpoint.create(directory, config, "hf", reader, allow_nonfinite=allow_nonfinite)


def _modelopt_config(directory: Path) -> dict[str, Any] | None:
    """What older directories of Model Optimizer say of weights beside config.json, if anything."""
    path = directory / modelopt.CONFIG_NAME
    if not path.is_file():
        return None
    quantization = read_json(path).get("quantization")
    if not isinstance(quantization, dict):
        raise ValueError(f"{path} has no object 'quantization'")
    if quantization.get("quant_algo") is None:  # the cache alone is quantised
        return None
    return quantization | {"quant_method": modelopt.QUANT_METHOD}


def refuse_pickle(path: Path) -> ValueError:
    """The error for a pickled checkpoint, which could run code when it is read."""
    return ValueError(
        f"{path} is a pickled checkpoint, which is never read because unpickling can run code; "
        "convert it to safetensors"
    )


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name.

    >>> is_hub_id("HuggingFaceTB/SmolLM2-135M"), is_hub_id("./models/mine"), is_hub_id("mine")
    (True, False, False)
    """
    return _HUB_ID.fullmatch(text) is not None


def download(repo_id: str) -> Path:
    """Downloads what is read of a hub repository, or finds it in the local cache.

    Args:
      repo_id: owner/name.

    Returns:
      The directory.

    Raises:
      FileNotFoundError: if there is no such repository, or the hub cannot be reached.
      ImportError: if `huggingface_hub` is missing.
      ValueError: if the index of the safetensors files is not sound.
    """
    directory = _snapshot(repo_id, _HUB_FILES)
    weight_map = read_index(directory)
    if weight_map is None:
        return directory
    return _snapshot(repo_id, (*_HUB_FILES, *sorted(set(weight_map.values()))))


def _snapshot(repo_id: str, files: Iterable[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"downloading {repo_id!r} needs: pip install 'lutjax[hf]'") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(files)))
    except Exception as error:  # the client raises many kinds, from HTTP to the local cache's
        raise FileNotFoundError(
            f"{repo_id!r} is neither a local path nor could it be downloaded from the hub: {error}"
        ) from error
