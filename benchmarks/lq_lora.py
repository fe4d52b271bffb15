"""Perplexity of LQ-LoRA at several budgets, before and after a short finetune.

Every matrix of SmolLM2-135M-Instruct is decomposed with every candidate configuration; the errors
are the costs that the plans are made from, and the models are put together from those same
decompositions. Then the low-rank parts are trained for a few steps; plain NormalFloat gets a new
adapter of the same rank (QLoRA). Windows of one text are evaluated on, the others serve Fisher
information and training. What is finished is kept in the cache directory, so that a stopped run
goes on where it was, and the results are written anew after every model::

    python benchmarks/lq_lora.py --output benchmarks/results

Low-rank parts are not counted in the budget, as in the paper (LQ-LoRA, arXiv 2311.12023): all
columns but plain NormalFloat before training have the same ones.
"""

from __future__ import annotations

import os

# LAPACK's threads wait for each other on the thin matrices here; one is many times faster.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lq_lora_report
import numpy as np
import optax
from tqdm import tqdm

import lutjax
from lutjax.adapters import lora
from lutjax.allocate import (
    CostTable,
    Plan,
    allocate,
    candidate_grid,
    nominal_bits,
    plot_plan,
    prune,
    stored_bytes,
)
from lutjax.allocate.grid import gaussian_error
from lutjax.arrays import LowRankArray
from lutjax.calibrate import Fisher, fisher, next_token_loss, plannable
from lutjax.cli.models import evaluation_text
from lutjax.evaluate import windows
from lutjax.io import demo_model_path, open_compressed
from lutjax.io.checkpoint import nest
from lutjax.models import Decoder
from lutjax.models.stacking import stack_layers
from lutjax.paths import named_leaves
from lutjax.transforms.decompose import decompose_array
from train.lora_step import Batch, Trained, TrainState, make_step, next_token
from train.metrics import perplexity

METHODS = ("nf", "loftq", "lq", "lq_fisher")
BUDGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
COLUMNS = (
    ("nf", "uniform"),
    ("loftq", "uniform"),
    ("lq", "uniform"),
    ("lq_fisher", "uniform"),
    ("lq", "ilp"),
    ("lq_fisher", "ilp"),
    ("nf", "ilp"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the figures."""

    rank: int = 32
    rounds: int = 5
    candidates: int = 6
    window: int = 512
    evaluated: int = 4
    tokens: int = 256
    samples: int = 32
    sample_tokens: int = 128
    steps: int = 16
    trained_tokens: int = 128

    def of_decompositions(self) -> dict[str, int]:
        """Those that the cached decompositions depend on."""
        fields = dataclasses.asdict(self)
        for name in ("tokens", "steps", "trained_tokens"):
            del fields[name]
        return fields


class Study:
    """The model, its text, and what has been computed about it."""

    def __init__(self, settings: Settings, cache: Path):
        self.settings = settings
        self.model, self.params, tokenizer = lutjax.load(demo_model_path())
        self.matrices = plannable(self.params)
        self.candidates = _candidates(self.matrices, settings.candidates)
        described = json.dumps(
            [settings.of_decompositions(), *(dataclasses.asdict(c) for c in self.candidates)]
        )
        self.cache = cache / hashlib.sha256(described.encode()).hexdigest()[:12]
        self.cache.mkdir(parents=True, exist_ok=True)
        self.weights = dict(named_leaves(self.params))
        self.evaluated, self.others = _split_text(tokenizer, settings)

    @functools.cached_property
    def fisher(self) -> Fisher:
        """Row and column means of the Fisher diagonal."""
        file = self.cache / "fisher.safetensors"
        if not file.exists():
            samples = _spread(self.others, self.settings.samples)[:, : self.settings.sample_tokens]
            batches = samples.reshape(-1, 4, samples.shape[-1])
            result = fisher(
                next_token_loss(self.model.apply),
                self.params,
                batches,
                checkpoint=self.cache / "fisher-running.safetensors",
                save_every=2,
                progress=True,
            )
            result.save(file)
        return Fisher.load(file)

    def decompose(self, method: str, j: int) -> np.ndarray:
        """Decomposes all matrices with one candidate; returns their costs."""
        directory = self.cache / f"{method}-{j}"
        costs_file = self.cache / f"{method}-{j}.json"
        if not (directory.exists() and costs_file.exists()):
            costs, leaves = [], {}
            for matrix in tqdm(self.matrices, desc=f"{method} {j}", unit="matrix", leave=False):
                array, cost = self._decompose_one(method, j, matrix.path)
                leaves[matrix.path] = array
                costs.append(cost)
            costs_file.write_text(json.dumps(costs))
            lutjax.save(directory, _nest(leaves))
        return np.array(json.loads(costs_file.read_text()))

    def _decompose_one(self, method: str, j: int, path: str) -> tuple[Any, float]:
        rule = lutjax.Rule(path, self.candidates[j])
        plain = method == "nf"
        result = decompose_array(
            self.weights[path],
            rule,
            # Plain quantisation has no low-rank part; a rank of 1 that is zero stands for it.
            rank=1 if plain else self.settings.rank,
            method={"nf": "lora", "lq_fisher": "lq"}.get(method, method),
            rounds=None if plain else self.settings.rounds,
            key=jax.random.key(0),
            fisher=self.fisher[path] if method == "lq_fisher" else None,
            path=path,
        )
        return result.array, float(result.error**2)

    @functools.cache  # noqa: B019 - there is one study in a process
    def table(self, method: str) -> CostTable:
        """Costs of all candidates."""
        columns = [self.decompose(method, j) for j in range(len(self.candidates))]
        return CostTable(self.matrices, self.candidates, np.stack(columns, axis=1))

    def plan(self, method: str, solver: str, budget: float) -> Plan:
        """A plan; the uniform ones of all methods are those of plain quantisation."""
        plan = allocate(self.table("nf" if solver == "uniform" else method), budget, solver=solver)
        if solver == "uniform":
            self.decompose(method, self.candidates.index(plan.choices[0].config))
        return plan

    def start(self, method: str, plan: Plan | None) -> tuple[Any, dict[str, LowRankArray]]:
        """The frozen base, dense, and the low-rank parts that it starts with.

        The original model and plain quantisation get new ones.
        """
        if plan is None:
            return self.params, self._new_adapter(self.params)
        base, adapter, nbytes = dict(self.weights), {}, 0
        readers: dict[int, Any] = {}
        for choice in plan.choices:
            j, path = self.candidates.index(choice.config), choice.matrix.path
            reader = readers.setdefault(j, open_compressed(self.cache / f"{method}-{j}"))
            quantized, adapter[path] = reader.read(path).parts
            nbytes += quantized.nbytes
            base[path] = quantized.materialize()
        assert nbytes == plan.nbytes, "the plan's bytes are not those that are stored"
        base = _nest(base)
        return base, self._new_adapter(base) if method == "nf" else adapter

    def _new_adapter(self, params: Any) -> dict[str, LowRankArray]:
        paths = tuple(matrix.path for matrix in self.matrices)
        return lora.init(params, self.settings.rank, jax.random.key(0), targets=paths)


class Training:
    """Trains low-rank parts on a dense copy of the frozen base.

    The function is the same as on the compressed base (`benchmarks/finetune_step.py` measures that
    one), and so one program, compiled once, serves all models and learning rates.
    """

    def __init__(self, study: Study):
        settings = study.settings
        # Stacked layers compile once instead of once for every block.
        model = Decoder(dataclasses.replace(study.model.config, scan_layers=True))
        self._optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
        apply = lutjax.lift(model.apply, strict=True)
        self._step = make_step(next_token(apply), self._optimizer)
        self._evaluated = _batch(study.evaluated)
        rows = _spread(study.others, settings.steps)[:, : settings.trained_tokens]
        self._rows = [_batch(row[None]) for row in rows]

    def before(self, base: Any, adapter: dict[str, LowRankArray]) -> float:
        """Perplexity on the evaluated windows."""
        base, trained = _stacked(base, adapter)
        return self._measure(trained, base)

    def after(self, base: Any, adapter: dict[str, LowRankArray], rate: float) -> float:
        """The same after training with a cosine schedule from `rate` to 0."""
        base, trained = _stacked(base, adapter)
        state = TrainState(trained, self._optimizer.init(trained))
        for i, row in enumerate(self._rows):
            now = rate * (1 + math.cos(math.pi * i / len(self._rows))) / 2
            state.optimizer.hyperparams["learning_rate"] = jnp.float32(now)
            state, _ = self._step.update(state, base, row)
        return self._measure(state.trained, base)

    def _measure(self, trained: Trained, base: Any) -> float:
        sums = self._step.evaluate(trained, base, self._evaluated)
        return perplexity(float(sums.loss) / float(sums.targets))


class Figures:
    """Perplexities before and after training, kept in the cache directory."""

    def __init__(self, study: Study, rates: tuple[float, ...]):
        self._study, self._rates = study, rates
        self._training = functools.cache(lambda: Training(study))

    @functools.cache  # noqa: B019 - there is one object in a process
    def tried(self, method: str) -> dict[str, float]:
        """Perplexity of a method's uniform plan of 3.25 bits after training, by learning rate."""
        plan = None if method == "dense" else self._study.plan(method, "uniform", 3.25)
        return {str(rate): self._after(method, plan, rate) for rate in self._rates}

    def of(self, stage: str, method: str, plan: Plan | None) -> dict[str, float]:
        """The perplexity of a plan's model, or of the original one, before or after training."""
        if stage == "before":
            return {"before": self._kept("before", method, plan)}
        tried = self.tried(method)
        return {"after": self._after(method, plan, float(min(tried, key=lambda r: tried[r])))}

    def _after(self, method: str, plan: Plan | None, rate: float) -> float:
        return self._kept("after", method, plan, rate)

    def _kept(self, stage: str, method: str, plan: Plan | None, *rate: float) -> float:
        recipe = "" if plan is None else plan.recipe.to_json()
        described = f"{stage}{method}{self._study.settings}{rate}{recipe}"
        name = hashlib.sha256(described.encode()).hexdigest()[:16]
        file = self._study.cache / f"perplexity-{name}.json"
        if not file.exists():
            start = self._study.start(method, plan)
            figure = getattr(self._training(), stage)(*start, *rate)
            file.write_text(json.dumps(figure))
        return json.loads(file.read_text())


def run(settings: Settings, rates: tuple[float, ...], cache: Path, output: Path) -> None:
    """Decomposes, trains, and writes the results after every model."""
    output.mkdir(parents=True, exist_ok=True)
    study = Study(settings, cache)
    print("candidates:", ", ".join(f"{nominal_bits(c):.3f}" for c in study.candidates))
    cells = [
        (budget, method, solver)
        for columns in (COLUMNS[:-1], COLUMNS[-1:])
        for budget in BUDGETS
        for method, solver in columns
    ]
    plans = {cell: study.plan(cell[1], cell[2], cell[0]) for cell in tqdm(cells, desc="plans")}
    plot_plan(
        plans[2.75, "lq_fisher", "ilp"],
        output / "lq_lora_plan.png",
        "LQ-LoRA with Fisher, 2.75 bits a weight",
    )
    figures = Figures(study, rates)
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "learning_rates": {},
        "dense": {},
        "rows": {str(budget): {} for budget in BUDGETS},
    }
    for stage in ("before", "after"):
        results["dense"] |= figures.of(stage, "dense", None)
        if stage == "after":
            results["learning_rates"] = {m: figures.tried(m) for m in ("dense", *METHODS)}
        for cell in tqdm(cells, desc=stage):
            budget, method, solver = cell
            row = results["rows"][str(budget)].setdefault(f"{method}/{solver}", {})
            row |= figures.of(stage, method, plans[cell])
            row["bits_per_weight"] = 8 * plans[cell].nbytes / plans[cell].size
            lq_lora_report.write(results, output)
        lq_lora_report.plot(results, output / "lq_lora.png")


def _stacked(base: Any, adapter: dict[str, LowRankArray]) -> tuple[Any, Trained]:
    base, adapter = lora.detach(stack_layers(lora.attach(base, adapter)))
    return base, Trained(adapter)


def _candidates(matrices: Any, most: int) -> tuple[lutjax.LutConfig, ...]:
    """Few of the paper's grid: spread over all sizes, and good uniform ones below each budget.

    Of those that fit a budget, the smallest within 1 % of the least error on normal weights.
    """
    grid = prune(candidate_grid(), bits=(2, 4.5))
    weights = sum(matrix.size for matrix in matrices)

    def bits(config: lutjax.LutConfig) -> float:
        return 8 * sum(m.count * stored_bytes(m.k, m.n, config) for m in matrices) / weights

    chosen = set(prune(grid, most=most))
    for budget in BUDGETS:
        fitting = [config for config in grid if bits(config) <= budget]
        least = min(map(gaussian_error, fitting))
        chosen.add(next(c for c in fitting if gaussian_error(c) <= 1.01 * least))
    return tuple(config for config in grid if config in chosen)


def _split_text(tokenizer: Any, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Windows to evaluate on, and the other windows of the same text."""
    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    chosen = windows(ids, settings.window, settings.evaluated)
    every = windows(ids, settings.window, 10**9)
    taken = {row.tobytes() for row in chosen}
    rest = np.stack([row for row in every if row.tobytes() not in taken])
    return chosen[:, : settings.tokens], rest


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.arange(count) * len(rows) // count]


def _batch(rows: np.ndarray) -> Batch:
    """One part for each row, so that the memory is that of one row."""
    tokens = jnp.asarray(rows)[:, None]
    targets = jnp.roll(tokens, -1, axis=-1).at[..., -1].set(-1)
    return Batch(tokens, jnp.ones_like(tokens), targets)


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    return nest(
        {path: jnp.asarray(a) if isinstance(a, np.ndarray) else a for path, a in leaves.items()}
    )


def main() -> None:
    """Reads the options and runs the study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "lutjax-lq-lora"
    )
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    )
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    options = vars(parser.parse_args())
    output, cache, rates = (options.pop(n) for n in ("output", "cache", "learning_rates"))
    run(Settings(**options), tuple(rates), cache, output)


if __name__ == "__main__":
    main()
