from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lutjax.allocate import allocate
from lutjax.calibrate import costs as costs_module
from lutjax.calibrate import measure_costs, plannable
from lutjax.transforms.decompose import decompose_array
from lutjax.transforms.recipe import LutConfig, Recipe, Rule

KEY = jax.random.key(0)
CANDIDATES = (LutConfig(2, 16), LutConfig(3, 16), LutConfig(4, 32))


def params(seed: int = 0) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (48, 32))},
        "b": {"kernel": 5 * jax.random.normal(keys[1], (2, 24, 40))},
        "embed": {"embedding": jax.random.normal(keys[2], (10, 32))},
    }


def measure(tree=None, **changes):
    arguments = {"rank": 2, "key": KEY, "method": "lorc"} | changes
    return measure_costs(tree or params(), CANDIDATES, **arguments)


def test_costs_are_the_squared_errors_of_decompose():
    fisher = {
        "a/kernel": np.random.default_rng(0).random((48, 32)).astype(np.float32),
        "b/kernel": (np.ones((2, 24), np.float32), np.ones((2, 40), np.float32)),
    }
    table = measure(fisher=fisher, workers=2)
    assert [m.path for m in table.matrices] == ["a/kernel", "b/kernel"]
    assert [m.count for m in table.matrices] == [1, 2]
    assert np.isinf(table.costs[1, 2])  # a group of 32 does not fit 24 rows
    for i, path in enumerate(("a/kernel", "b/kernel")):
        for j in range(2):
            weight = params()[path[0]]["kernel"]
            result = decompose_array(
                weight,
                Rule(path, CANDIDATES[j]),
                rank=2,
                key=KEY,
                method="lorc",
                fisher=fisher[path],
                path=path,
            )
            np.testing.assert_allclose(table.costs[i, j], (result.error**2).sum(), rtol=1e-5)
    plan = allocate(table, 3.5)
    assert plan.bits_per_weight <= 3.5


def test_cache_resumes_and_survives_a_torn_line(tmp_path, monkeypatch):
    cache = tmp_path / "costs.jsonl"
    calls = []

    def stopping(*arguments, **keywords):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counting(*arguments, **keywords)

    def counting(*arguments, **keywords):
        calls.append(keywords["path"])
        return decompose_array(*arguments, **keywords)

    monkeypatch.setattr(costs_module, "decompose_array", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(cache=cache)
    assert len([line for line in cache.read_text().splitlines() if line]) == 3
    with open(cache, "a") as file:
        file.write('{"id": "torn')
    monkeypatch.setattr(costs_module, "decompose_array", counting)
    table = measure(cache=cache)
    assert len(calls) == 5  # of the five decompositions, three were kept
    monkeypatch.setattr(costs_module, "decompose_array", None)
    np.testing.assert_array_equal(measure(cache=cache).costs, table.costs)
    np.testing.assert_allclose(table.costs, reference := _fresh(monkeypatch), rtol=1e-6)
    assert np.isfinite(reference).sum() == 5


def _fresh(monkeypatch):
    monkeypatch.setattr(costs_module, "decompose_array", decompose_array)
    return measure().costs


def test_other_settings_are_measured_anew(tmp_path):
    cache = tmp_path / "costs.jsonl"
    first = measure(cache=cache)
    other = measure(cache=cache, rank=4)
    assert (other.costs[:, :2] < first.costs[:, :2]).all()
    lines = [json.loads(line) for line in cache.read_text().splitlines() if line]
    assert len(lines) == 10


def test_other_axes_are_measured_anew(tmp_path):
    weights = {"w": jax.random.normal(KEY, (32, 32)) * jnp.arange(32.0)[None]}
    arguments = {"rank": 2, "key": KEY, "cache": tmp_path / "costs.jsonl"}
    rows, columns = (
        measure_costs(
            weights, [CANDIDATES[0]], recipe=Recipe((Rule("w", CANDIDATES[0], axis),)), **arguments
        ).costs
        for axis in (-2, -1)
    )
    assert rows[0, 0] != pytest.approx(columns[0, 0], rel=1e-3)


def test_cache_of_other_weights(tmp_path):
    cache = tmp_path / "costs.jsonl"
    measure(cache=cache)
    with pytest.raises(ValueError, match=r"made from other weights: 'a/kernel' differs"):
        measure(params(seed=1), cache=cache)


def test_plannable_from_shapes():
    shapes = jax.eval_shape(params)
    assert plannable(shapes) == plannable(params())


def test_every_matrix_needs_fisher_information():
    params = {"kernel": jnp.ones((64, 32))}
    with pytest.raises(ValueError, match="Fisher information has nothing for 'kernel'"):
        measure_costs(params, [LutConfig(2)], rank=2, key=jax.random.key(0), fisher={})


def test_bad_input():
    with pytest.raises(ValueError, match="no candidates"):
        measure_costs(params(), (), rank=2, key=KEY)
    with pytest.raises(ValueError, match="no candidate fits 'b/kernel'"):
        measure_costs(params(), [LutConfig(4, 32)], rank=2, key=KEY)
    with pytest.raises(ValueError, match="rank=99"):
        measure(rank=99)
    broken = params()
    broken["a"]["kernel"] = jnp.full((48, 32), jnp.nan)
    with pytest.raises(ValueError, match="'a/kernel' has 1536 NaN"):
        measure(broken)
    with pytest.raises(ValueError, match="workers=0"):
        measure(workers=0)
    with pytest.raises(ValueError, match="reaches no matrix"):
        measure(recipe=Recipe((Rule("*", None),)))
