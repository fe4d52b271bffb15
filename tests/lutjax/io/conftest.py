from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import hf_tensors, random_values, write_hf


@pytest.fixture
def hf_directory(tmp_path, tiny_config) -> Path:
    write_hf(tmp_path / "model", tiny_config, hf_tensors(random_values(tiny_config)))
    return tmp_path / "model"
