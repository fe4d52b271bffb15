"""What crosses the network, read off the compiled program for eight devices."""

from pathlib import Path

import jax
import optax
import pytest

from lutjax import linear_maps as lm
from lutjax.adapters import dual, merge_workers, start_worker
from lutjax.optim import project
from tests.virtual_devices import printed_json

K, N, RANK, WORKERS = 64, 96, 4, 8


@pytest.fixture(scope="module")
def results():
    return printed_json(Path(__file__).parent / "eight_devices.py", 8)


@pytest.mark.parametrize("name", ["gaussian", "svd"])
def test_sharded_steps_equal_those_of_one_device(results, name):
    # float32 sums over 64 examples in another order, five Adam steps of 1e-2.
    assert results[name]["difference"] < 1e-4


def test_only_the_projected_gradient_is_reduced(results):
    sizes = [size for _, size, _ in results["gaussian"]["collectives"]]
    assert sum(sizes) == RANK * N + N  # the latent of w, and b; the full gradient is K * N


def test_a_map_from_the_gradient_reduces_it_whole_only_at_a_refresh(results):
    entry = [size for _, size, in_entry in results["svd"]["collectives"] if in_entry]
    branches = [size for _, size, in_entry in results["svd"]["collectives"] if not in_entry]
    assert sum(entry) == RANK * N + N
    assert branches == [K * N]


def test_workers_do_not_talk_between_merges(results):
    assert results["workers"]["local"] == []


def test_a_merge_gathers_latents_and_averages_the_workers(results):
    merged = results["workers"]
    gathers = [size for op, size, _ in merged["merge"] if op == "all-gather"]
    reduces = [size for op, size, _ in merged["merge"] if op == "all-reduce"]
    assert gathers == [WORKERS * RANK * N]
    assert sum(reduces) == N  # the bias, which has no adapter
    assert merged["moved"] > 1e-3
    # float32: sums of eight updates in another order.
    assert merged["difference"] < 1e-5


def test_workers_span_different_spaces(results):
    assert results["workers"]["joint_rank"] == WORKERS * RANK


def test_workers_need_maps_that_others_can_regenerate():
    training = dual(project(optax.sgd(0.1), lm.SVD(2)))
    state = training.init({"w": jax.numpy.ones((4, 4))})
    with pytest.raises(ValueError, match="can't regenerate each other's maps"):
        start_worker(training, state, "data")


@pytest.mark.parametrize("map_", [lm.Identity(), lm.KronA((2, 2))], ids=repr)
def test_workers_need_maps_that_differ(map_):
    training = dual(project(optax.sgd(0.1), map_))
    state = training.init({"w": jax.numpy.ones((4, 4))})
    for meet in (start_worker, merge_workers):
        with pytest.raises(ValueError, match="one draw for 'w', the same for all workers; use"):
            meet(training, state, "data")
