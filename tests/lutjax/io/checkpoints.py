"""Small checkpoints for the tests to write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lutjax.io.checkpoint import parameter_shapes
from lutjax.io.configs import config_to_hf
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.models import DecoderConfig


def random_values(config: DecoderConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def hf_tensors(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        checkpoint_name(path, "hf"): np.ascontiguousarray(value.T if is_transposed(path) else value)
        for path, value in values.items()
    }


def write_hf(
    directory: Path, config: DecoderConfig, tensors: dict[str, np.ndarray], shards: int = 1
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
