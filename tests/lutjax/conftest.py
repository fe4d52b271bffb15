from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lutjax.io import Tokenizer, demo_model_path, load
from lutjax.models import Decoder, DecoderConfig

DATA = Path(__file__).parents[1] / "data"


@dataclasses.dataclass(frozen=True)
class SmolLM2:
    """The demo model and what transformers computes with it (tests/data/smollm2)."""

    path: Path
    model: Decoder
    params: dict[str, Any]
    tokenizer: Tokenizer
    reference: dict[str, Any]
    logits: dict[str, np.ndarray]
    windows: np.ndarray


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    try:
        path = demo_model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, params, tokenizer = load(path)
    assert tokenizer is not None
    directory = DATA / "smollm2"
    return SmolLM2(
        path,
        model,
        params,
        tokenizer,
        json.loads((directory / "reference.json").read_text()),
        dict(np.load(directory / "logits.npz")),
        np.load(directory / "windows.npz")["windows"],
    )


@pytest.fixture
def tiny_config() -> DecoderConfig:
    """A decoder whose sizes all differ, so that no two axes can be swapped unnoticed."""
    return DecoderConfig(
        vocab_size=37,
        hidden_size=20,
        intermediate_size=28,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_position_embeddings=128,
    )
