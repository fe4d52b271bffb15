"""Compressing sharded weights with explicit mesh axes, which are what ``jax.make_mesh`` makes."""

from pathlib import Path

import pytest

from tests.virtual_devices import printed_json


@pytest.fixture(scope="module")
def results():
    return printed_json(Path(__file__).parent / "explicit_meshes.py", 4)


QUANTIZED = ["nf4", "double_quant", "higgs", "under jit", "hessians"]


@pytest.mark.parametrize("name", [*QUANTIZED, "without set_mesh", "under jit without set_mesh"])
def test_quantized_weights_are_those_of_one_device_and_stay_sharded(results, name):
    assert results[name]["difference"] < 1e-5
    assert results[name]["sharded"]


@pytest.mark.parametrize("name", ["decompose", "decompose without set_mesh"])
def test_decomposed_weights_stay_sharded(results, name):
    assert results[name]["difference"] < 1e-4  # factors are sums in another order
    assert results[name]["sharded"]


@pytest.mark.parametrize("what", ["means", "full", "split samples"])
def test_fisher_information_is_that_of_one_device(results, what):
    assert results[f"fisher {what}"]["difference"] < 1e-4
    assert results[f"fisher {what}"]["traced"] == 1  # for two batches


def test_weights_that_do_not_split_are_named(results):
    assert "mlp/kernel" in results["refused"] and "whole blocks" in results["refused"]


def test_products_of_adapters_are_typed_as_those_of_their_base(results):
    assert results["adapter"] == [None, "y"]


def test_products_outside_lift_are_sharded_as_the_weight(results):
    (right, a), (transposed, b) = results["outside lift"]
    assert right == [None, "y"] and transposed == [None, "x"]
    assert max(a, b) < 1e-4
