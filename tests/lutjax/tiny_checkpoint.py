"""A decoder, and a Hugging Face directory of one, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import tokenizers

from lutjax.io.checkpoint import parameter_shapes
from lutjax.io.configs import config_to_hf
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.io.safetensors_writer import SafetensorsWriter
from lutjax.io.tokenizer import Tokenizer
from lutjax.models import DecoderConfig

TINY = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
"""Its matrices have whole groups of 16."""


def dense_params(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal weights by path, float32."""
    rng = np.random.default_rng(seed)
    return {
        path: rng.normal(size=shape).astype(np.float32) * 0.1
        for path, shape in parameter_shapes(config).items()
    }


def write_hf(directory: Path, config: DecoderConfig, params: dict[str, np.ndarray]) -> Path:
    """Writes config.json, model.safetensors and a tokenizer of single letters."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    tensors = {
        checkpoint_name(path, "hf"): np.ascontiguousarray(v.T if is_transposed(path) else v)
        for path, v in params.items()
    }
    specs = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in tensors.items()}
    with SafetensorsWriter(directory, specs) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    tiny_tokenizer(config.vocab_size).save(directory)
    return directory


def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    """One token for each letter and sign."""
    signs = [chr(ord("a") + i) for i in range(26)] + [" ", ".", "?", *map(str, range(10))]
    vocab = {sign: i for i, sign in enumerate(signs[:vocab_size])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


def bfloat16(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: value.astype(ml_dtypes.bfloat16) for path, value in params.items()}


def assert_same_bits(found, expected) -> None:
    """The same tree, dtypes and bytes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
