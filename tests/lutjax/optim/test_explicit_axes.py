"""Sharded parameters on a mesh with explicit axes, which is what ``jax.make_mesh`` makes."""

from pathlib import Path

import pytest

from tests.virtual_devices import printed_json


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).parent / "explicit_axes.py"
    return printed_json(script, 4)


OPTIMIZERS = ["galore", "galore_8bit", "flora", "lift", "adam_8bit", "plateau"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "without set_mesh"])
def test_updates_equal_those_of_one_device_and_keep_their_sharding(results, name):
    found = results[name]
    assert found["difference"] < 1e-4  # float32 sums in another order; updates are about 1e-2
    assert found["kept"]


@pytest.mark.parametrize(
    "name", ["galore", "galore_8bit", "flora", "adam_8bit", "without set_mesh"]
)
def test_moments_are_sharded_as_their_parameters(results, name):
    in_codes = name not in ("galore", "flora")
    assert results[name]["moments"] == [[in_codes, True]] * 2
