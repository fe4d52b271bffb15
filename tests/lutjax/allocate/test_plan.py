from __future__ import annotations

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax.allocate import (
    Budget,
    CostTable,
    InfeasibleBudgetError,
    Matrix,
    Plan,
    allocate,
    candidate_grid,
    higgs_grid,
    nominal_bits,
    plot_plan,
    prune,
    stored_bytes,
)
from lutjax.allocate.grid import gaussian_error
from lutjax.arrays import DoubleQuant
from lutjax.calibrate import plannable
from lutjax.cli.allocate import Allocate
from lutjax.io.checkpoint import parameter_shapes
from lutjax.models import MODELS
from lutjax.transforms.recipe import LutConfig, Recipe

SMALL = prune(candidate_grid(), most=8, bits=(2, 4.5))


def test_grid():
    grid = candidate_grid()
    sizes = {nominal_bits(config) for config in grid}
    assert len(grid) == 432 and len(sizes) == 184
    assert round(min(sizes), 2) == 2.03 and round(max(sizes), 3) == 8.625
    kept = prune(grid)
    errors = [gaussian_error(config) for config in kept]
    assert [nominal_bits(c) for c in kept] == sorted(nominal_bits(c) for c in kept)
    assert errors == sorted(errors, reverse=True)
    # Whatever was dropped is beaten by something that was kept.
    for config in grid[::7]:
        assert any(
            nominal_bits(k) <= nominal_bits(config) and gaussian_error(k) <= gaussian_error(config)
            for k in kept
        )
    assert len(SMALL) == 8 and SMALL[0] == prune(grid, bits=(2, 4.5))[0]
    assert {(c.bits, c.codebook) for c in grid} == {(2, "nf"), (3, "nf"), (4, "nf"), (8, "int")}


@pytest.mark.parametrize("budget", [2.2, 2.5, 3, 3.5, 4.25, 5, 6, 8])
def test_plans_of_few_candidates_are_as_good_as_those_of_all(budget):
    matrices = [Matrix(f"{i}/kernel", 4096, 4096) for i in range(64)]
    spread = np.exp(np.random.default_rng(0).standard_normal(len(matrices)))
    alphas = {m.path: float(a) for m, a in zip(matrices, spread, strict=True)}

    def cost(grid, most):
        candidates = prune(grid, most=most)
        table = CostTable.of_sensitivities(matrices, candidates, alphas)
        return allocate(table, budget, solver="dp").cost

    few = cost(candidate_grid(), Allocate.candidates)
    assert few <= (1.05 if budget == 8 else 1.02) * cost(candidate_grid(), None)
    assert few <= (0.9 if budget == 8 else 1.01) * cost(candidate_grid(codebook="nf"), None)


@pytest.mark.parametrize(
    "config",
    [
        LutConfig(3, 64),
        LutConfig(4, "column", scale_dtype="float32"),
        LutConfig(2, 16, "affine"),
        LutConfig(4, 32, "affine", double_quant=lutjax.DoubleQuant(6, 16, "float16")),
        LutConfig(8, 32, "kmeans"),
        LutConfig.higgs(2.5, 64),
        LutConfig(3, 64, "gaussian", double_quant=lutjax.DoubleQuant()),
        *candidate_grid()[::61],
    ],
)
@pytest.mark.parametrize(("k", "n"), [(64, 192), (100, 37)])
def test_stored_bytes_are_those_of_the_array(config, k, n):
    params = {"kernel": jax.ShapeDtypeStruct((k, n), jnp.float32)}
    recipe = Recipe((lutjax.Rule("kernel", config),))
    array = jax.eval_shape(lambda p: lutjax.quantize(p, recipe), params)["kernel"]
    assert stored_bytes(k, n, config) == array.nbytes


def test_gaussian_errors_match_the_published_ones():
    # NF3 and NF4 at groups of 64 with plain scales; a simulation of 49,152 numbers.
    assert gaussian_error(LutConfig(4, 64)) == pytest.approx(0.00846, rel=0.02)
    assert gaussian_error(LutConfig(3, 64, "nf_flute")) == pytest.approx(0.0406, rel=0.02)
    assert gaussian_error(LutConfig(2, 64, "nf_flute")) == pytest.approx(0.316, rel=0.02)
    assert gaussian_error(LutConfig.higgs(4)) == pytest.approx(0.00777, rel=0.02)
    assert gaussian_error(LutConfig.higgs(2)) == pytest.approx(0.1076, rel=0.02)


@pytest.mark.parametrize("group_size", [16, 100, 128, 512, "column"])
@pytest.mark.parametrize("double_quant", [None, lutjax.DoubleQuant(bits=4, block=100)])
def test_simulated_errors_are_those_of_quantising(group_size, double_quant):
    config = LutConfig(3, group_size, scale_dtype="float32", double_quant=double_quant)
    w = jax.random.normal(jax.random.key(0), (1024, 200))
    q = lutjax.quantize(w, Recipe((lutjax.Rule("*", config),))).materialize()
    measured = float(jnp.sum((w - q) ** 2) / jnp.sum(w**2))
    assert gaussian_error(config, k=1024) == pytest.approx(measured, rel=0.03)


def test_higgs_plans_follow_the_sensitivities(tmp_path):
    matrices = [Matrix(f"{i}/kernel", 512, 64) for i in range(4)]
    candidates = higgs_grid((2, 2.5, 3, 3.5, 4))
    alphas = {m.path: 10.0**-i for i, m in enumerate(matrices)}
    table = CostTable.of_sensitivities(matrices, candidates, alphas)
    plan = allocate(table, 3.1)
    bits = [choice.config.bits / 2 for choice in plan.choices]
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]
    assert plan.bits_per_weight <= 3.1
    # by enumeration of all 5**4 plans
    fitting = [
        sum(table.costs[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.product(range(5), repeat=4)
        if 8 * sum(table.sizes()[i, j] for i, j in enumerate(chosen)) <= 3.1 * 4 * 512 * 64
    ]
    assert plan.cost == pytest.approx(min(fitting), rel=1e-9)
    plan.save(tmp_path / "plan.json")
    assert Recipe.load(tmp_path / "plan.json") == plan.recipe
    assert "8 / 2" in str(plan)
    with pytest.raises(ValueError, match="there is no sensitivity for '3/kernel'"):
        CostTable.of_sensitivities(matrices, candidates, {k: alphas[k] for k in list(alphas)[:3]})
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"the sensitivity of '0/kernel' is {bad}"):
            CostTable.of_sensitivities(matrices, candidates, alphas | {"0/kernel": bad})


def params() -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "layers": {
            str(i): {
                "q_proj": {"kernel": jax.random.normal(next(keys), (64, 48)) * 3.0**i},
                "up_proj": {"kernel": jax.random.normal(next(keys), (64, 160))},
            }
            for i in range(3)
        },
        "embed": {"embedding": jax.random.normal(next(keys), (100, 64))},
    }


def table(candidates=SMALL) -> CostTable:
    matrices = [
        Matrix(f"layers/{i}/{name}/kernel", 64, n)
        for i in range(3)
        for name, n in (("q_proj", 48), ("up_proj", 160))
    ]
    return CostTable.of_shapes(matrices, candidates)


@pytest.mark.parametrize("solver", ["ilp", "dp", "greedy", "uniform"])
@pytest.mark.parametrize("budget", [2.5, 3.1, 3.9])
def test_budget_recounted_from_stored_bytes(solver, budget):
    plan = allocate(table(), budget, solver=solver)
    quantized = lutjax.quantize(params(), plan)
    stored = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(quantized, is_leaf=lutjax.is_compressed)
        if lutjax.is_compressed(leaf)
    )
    assert stored == plan.nbytes
    assert 8 * stored <= budget * plan.size
    decomposed = jax.eval_shape(
        lambda p: lutjax.decompose(p, plan, rank=2, key=jax.random.key(0), rounds=1),
        params(),
    )
    leaves = jax.tree.leaves(decomposed, is_leaf=lutjax.is_compressed)
    assert sum(x.parts[0].nbytes for x in leaves if lutjax.is_compressed(x)) == plan.nbytes
    assert sum(x.parts[1].nbytes for x in leaves if lutjax.is_compressed(x)) == sum(
        choice.matrix.adapter_bytes(2, itemsize=4) for choice in plan.choices
    )


def test_ilp_is_not_worse_than_the_others():
    cost = {s: allocate(table(), 3.1, solver=s).cost for s in ("ilp", "dp", "greedy", "uniform")}
    assert cost["ilp"] == min(cost.values())
    assert cost["uniform"] > 1.05 * cost["ilp"]


def test_plan_is_a_recipe_and_its_file_a_recipe_file(tmp_path):
    plan = allocate(table(), 3.1)
    assert isinstance(plan, Recipe)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Recipe.load(tmp_path / "plan.json") == plan.recipe
    assert json.loads(plan.to_json())["plan"]["bits_per_weight"] == plan.bits_per_weight
    for path in ("layers/0/q_proj/kernel", "embed/embedding"):
        assert (plan.rule_for(path) is None) == path.startswith("embed")
    for broken in ("[]", "{}", Recipe.uniform().to_json(), plan.to_json().replace('"k"', '"q"')):
        with pytest.raises(ValueError, match=r"not a (plan|recipe)"):
            Plan.from_json(broken)


def test_tables_and_plot(tmp_path):
    plan = allocate(table(), 3.1)
    assert len(str(plan).splitlines()) == 8
    assert "layers/2/up_proj/kernel" in str(plan)
    assert [line.split()[0] for line in plan.by_kind().splitlines()] == [
        "kind",
        "q_proj",
        "up_proj",
        "6",
    ]
    assert repr(plan).startswith("Plan(6 matrices, ")
    plot_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "budget",
    [
        Budget(nbytes=20_000, fixed_bytes=5_000),
        Budget(bits_per_weight=6.0, fixed_bytes=12_800, fixed_weights=6_400),
        Budget(bits_per_weight=3.5, fixed_bytes=1_000),
    ],
)
def test_other_things_are_counted(budget):
    plan = allocate(table(), budget)
    total = plan.nbytes + budget.fixed_bytes
    if budget.nbytes is not None:
        assert total <= budget.nbytes
        assert total > 0.97 * budget.nbytes
    else:
        assert 8 * total <= budget.bits_per_weight * (plan.size + budget.fixed_weights)


@pytest.mark.parametrize(
    ("make", "unit"),
    [
        (lambda b: Budget(nbytes=math.ceil(b)), "bytes"),
        (lambda b: Budget(nbytes=math.ceil(b), fixed_bytes=500), "bytes"),
        (lambda b: Budget(bits_per_weight=b), "bits a weight"),
        (lambda b: Budget(bits_per_weight=b, fixed_bytes=77, fixed_weights=5), "bits a weight"),
    ],
)
def test_the_smallest_feasible_budget_that_is_named_is_feasible(make, unit):
    with pytest.raises(InfeasibleBudgetError, match=f"smallest feasible one is .* {unit}") as error:
        allocate(table(), make(1.0))
    named = float(str(error.value).split("smallest feasible one is ")[1].split()[0])
    plan = allocate(table(), make(named))
    assert plan.nbytes == error.value.smallest
    with pytest.raises(InfeasibleBudgetError):
        allocate(table(), make(named - (1 if unit == "bytes" else 2e-3)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"no candidate fits 'a' with K=16, N=8"):
        CostTable.of_shapes([Matrix("a", 16, 8)], [LutConfig(4, 32), LutConfig(4, 64)])
    with pytest.raises(ValueError, match="cost of 'a' is NaN"):
        CostTable((Matrix("a", 64, 8),), SMALL[:1], np.array([[np.nan]]))
    with pytest.raises(ValueError, match="neither may be empty"):
        CostTable((), SMALL, np.zeros((0, 8)))
    with pytest.raises(ValueError, match="solver='lp' is unknown; use one of ilp"):
        allocate(table(), 3.0, solver="lp")
    for wrong in ({}, {"bits_per_weight": 3.0, "nbytes": 3}):
        with pytest.raises(ValueError, match="either in bits a weight or in bytes"):
            Budget(**wrong)
    for value in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            allocate(table(), value)
    with pytest.raises(ValueError, match="most=1"):
        prune(SMALL, most=1)
    with pytest.raises(ValueError, match="no candidate has between 9 and 10"):
        prune(SMALL, bits=(9, 10))


def test_shapes_of_known_models():
    billions = {
        name: sum(map(math.prod, parameter_shapes(config).values())) / 1e9
        for name, config in MODELS.items()
    }
    published = {
        "llama-2-7b": 6.738,
        "llama-2-13b": 13.016,
        "llama-2-70b": 68.977,
        "llama-3-8b": 8.030,
        "llama-3-70b": 70.554,
        "mistral-7b": 7.242,
        "smollm2-135m": 0.1345,
    }
    assert billions == pytest.approx(published, rel=1e-3)


def test_seventy_billion_on_paper():
    shapes = parameter_shapes(MODELS["llama-2-70b"])
    weights = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()}
    matrices = plannable(weights)
    candidates = [LutConfig(b, 64, double_quant=DoubleQuant(3, 64, "bfloat16")) for b in (2, 3, 4)]
    plan = allocate(CostTable.of_shapes(matrices, candidates), 2.75)
    assert 2.7 < plan.bits_per_weight <= 2.75
    adapters = sum(matrix.adapter_bytes(64) for matrix in matrices)
    others = lutjax.summarize(weights).size - sum(matrix.size for matrix in matrices)
    total = plan.nbytes + 2 * others + adapters
    assert 25e9 < total < 27e9
