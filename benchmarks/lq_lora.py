"""Perplexity of LQ-LoRA at several budgets, against plain NormalFloat and LoftQ.

Every matrix of SmolLM2-135M-Instruct is decomposed with every candidate configuration; the errors
are the costs that the plans are made from, and the plans are put together from those same
decompositions. Calibration and evaluation use different windows of one text. Everything that is
finished is kept in the cache directory, so a stopped run goes on where it was::

    python benchmarks/lq_lora.py --output benchmarks/results

Low-rank parts are not counted in the budget, as in the paper (LQ-LoRA, arXiv 2311.12023): all
columns but plain NormalFloat have the same ones.
"""

from __future__ import annotations

import os

# LAPACK's threads wait for each other on the thin matrices here; one is many times faster.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lutjax
from lutjax.allocate import (
    CostTable,
    InfeasibleBudgetError,
    Plan,
    allocate,
    candidate_grid,
    nominal_bits,
    plot_plan,
    prune,
)
from lutjax.calibrate import Fisher, fisher, next_token_loss, plannable
from lutjax.evaluate import perplexity, windows
from lutjax.io import demo_model_path, open_compressed
from lutjax.transforms.decompose import decompose_array

BUDGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
METHODS = {"nf": "plain NF", "loftq": "LoftQ", "lq": "LQ", "lq_fisher": "LQ + Fisher"}
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
    candidates: int = 8
    window: int = 512
    evaluated: int = 4
    evaluated_tokens: int = 512
    samples: int = 32
    sample_tokens: int = 128

    def of_decompositions(self) -> dict[str, int]:
        """Those that the cached decompositions depend on."""
        fields = dataclasses.asdict(self)
        del fields["evaluated_tokens"]
        return fields


class Study:
    """The model, its text, and what has been computed about it."""

    def __init__(self, settings: Settings, cache: Path):
        self.settings = settings
        self.model, self.params, tokenizer = lutjax.load(demo_model_path())
        self.matrices = plannable(self.params)
        self.candidates = prune(candidate_grid(), most=settings.candidates, bits=(2, 4.5))
        described = json.dumps(
            [settings.of_decompositions(), *(dataclasses.asdict(c) for c in self.candidates)]
        )
        self.cache = cache / hashlib.sha256(described.encode()).hexdigest()[:12]
        self.cache.mkdir(parents=True, exist_ok=True)
        self.weights = dict(_named(self.params))
        self.evaluation, self.calibration = _split_text(tokenizer, settings)
        self.apply = self.model.apply
        self.fisher: Fisher | None = None

    def calibrate(self) -> None:
        """Row and column means of the Fisher diagonal."""
        file = self.cache / "fisher.safetensors"
        if not file.exists():
            batches = self.calibration.reshape(-1, 4, self.calibration.shape[-1])
            loss = next_token_loss(self.apply)
            running = self.cache / "fisher-running.safetensors"
            result = fisher(
                loss, self.params, batches, checkpoint=running, save_every=2, progress=True
            )
            result.save(file)
        self.fisher = Fisher.load(file)

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
            # A plain model has no low-rank part; a rank of 1 that is zero stands for it.
            rank=1 if plain else self.settings.rank,
            method={"nf": "lora", "lq_fisher": "lq"}.get(method, method),
            rounds=None if plain else self.settings.rounds,
            key=jax.random.key(0),
            fisher=self.fisher[path] if method == "lq_fisher" else None,
            path=path,
        )
        return result.array, float(result.error**2)

    def table(self, method: str) -> CostTable:
        """Costs of all candidates."""
        columns = [self.decompose(method, j) for j in range(len(self.candidates))]
        return CostTable(self.matrices, self.candidates, np.stack(columns, axis=1))

    def perplexity(self, method: str, plan: Plan) -> dict[str, float]:
        """Perplexity of the model that a plan makes, and its stored bits a weight."""
        name = hashlib.sha256(
            f"{method}{self.settings}{plan.recipe.to_json()}".encode()
        ).hexdigest()[:16]
        file = self.cache / f"perplexity-{name}.json"
        if not file.exists():
            dense, nbytes = dict(self.weights), 0
            readers: dict[int, Any] = {}
            for choice in plan.choices:
                j = self.candidates.index(choice.config)
                reader = readers.setdefault(j, open_compressed(self.cache / f"{method}-{j}"))
                array = reader.read(choice.matrix.path)
                nbytes += array.parts[0].nbytes
                dense[choice.matrix.path] = array.materialize()
            assert nbytes == plan.nbytes, "the plan's bytes are not those that are stored"
            file.write_text(
                json.dumps(
                    {
                        "perplexity": self.measure(_nest(dense)),
                        "bits_per_weight": 8 * nbytes / plan.size,
                    }
                )
            )
        return json.loads(file.read_text())

    def measure(self, params: Any) -> float:
        """Perplexity on the evaluation windows."""
        return perplexity(self.apply, params, self.evaluation).perplexity


def run(settings: Settings, cache: Path, output: Path) -> None:
    """Makes the table, the plot and the JSON file."""
    study = Study(settings, cache)
    print("candidates:", ", ".join(f"{nominal_bits(c):.3f}" for c in study.candidates))
    study.calibrate()
    dense = study.measure(study.params)
    tables: dict[str, CostTable] = {}
    rows: dict[str, dict[str, Any]] = {str(budget): {} for budget in BUDGETS}
    for method, solver in COLUMNS:
        if solver == "uniform" and method != "nf":
            # The uniform plan of plain NF: the same table and size for every method.
            plans = {b: p for b, (p, _) in rows_plans(rows, "nf/uniform").items()}
            for plan in plans.values():
                study.decompose(method, study.candidates.index(plan.choices[0].config))
        else:
            tables[method] = study.table(method) if method not in tables else tables[method]
            plans = _plans(tables[method], solver)
        for budget, plan in tqdm(plans.items(), desc=f"{method} {solver}", unit="budget"):
            figures = study.perplexity(method, plan)
            rows[str(budget)][f"{method}/{solver}"] = figures | {"plan": plan}
        _write(settings, rows, dense, output)
    plan = rows["2.75"]["lq_fisher/ilp"]["plan"]
    plot_plan(plan, output / "lq_lora_plan.png", "LQ-LoRA with Fisher, 2.75 bits a weight")


def rows_plans(rows: dict[str, dict[str, Any]], column: str) -> dict[float, tuple[Plan, float]]:
    """The plans of a finished column by budget."""
    return {
        float(budget): (cells[column]["plan"], cells[column]["perplexity"])
        for budget, cells in rows.items()
        if column in cells
    }


def _plans(table: CostTable, solver: str) -> dict[float, Plan]:
    plans = {}
    for budget in BUDGETS:
        try:
            plans[budget] = allocate(table, budget, solver=solver)
        except InfeasibleBudgetError as error:
            print(error)
    return plans


def _write(settings: Settings, rows: dict[str, Any], dense: float, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    names = [f"{method}/{solver}" for method, solver in COLUMNS]
    shown = [name for name in names if any(name in cells for cells in rows.values())]
    titles = {f"{m}/{s}": f"{METHODS[m]}, {s}" for m, s in COLUMNS}
    some = next(cells for cells in rows.values() if "nf/uniform" in cells)["nf/uniform"]["plan"]
    adapters = sum(choice.matrix.adapter_bytes(settings.rank) for choice in some.choices)
    low_rank = 8 * adapters / some.size
    lines = [
        f"Perplexity of SmolLM2-135M-Instruct, dense {dense:.3f}, before finetuning, on "
        f"{settings.evaluated} windows of {settings.evaluated_tokens} tokens; Fisher information "
        f"from {settings.samples} samples of {settings.sample_tokens} tokens of other windows of "
        f"the same text. In brackets the stored bits a weight of the quantised parts. All columns "
        f"but plain NF also have low-rank parts of rank {settings.rank}, which are not counted: "
        f"{low_rank:.2f} more in bfloat16.",
        "",
        "| budget | " + " | ".join(titles[name] for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for budget, cells in rows.items():
        best = min((cells[name]["perplexity"] for name in shown if name in cells), default=0.0)
        texts = []
        for name in shown:
            if name not in cells:
                texts.append("")
                continue
            value, bits = cells[name]["perplexity"], cells[name]["bits_per_weight"]
            mark = "**" if value == best else ""
            texts.append(f"{mark}{value:.2f}{mark} ({bits:.2f})")
        lines.append(f"| {budget} | " + " | ".join(texts) + " |")
    table = "\n".join(lines)
    print("\n" + table + "\n")
    (output / "lq_lora.md").write_text(table + "\n")
    data = {
        "settings": dataclasses.asdict(settings),
        "dense": dense,
        "rows": {
            budget: {
                name: {k: v for k, v in figures.items() if k != "plan"}
                for name, figures in cells.items()
            }
            for budget, cells in rows.items()
        },
    }
    (output / "lq_lora.json").write_text(json.dumps(data, indent=2) + "\n")
    _plot(rows, shown, titles, dense, output / "lq_lora.png")


def _plot(
    rows: dict[str, Any], shown: list[str], titles: dict[str, str], dense: float, path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = {"nf": "#4c566a", "loftq": "#e9c46a", "lq": "#5e81ac", "lq_fisher": "#e76f51"}
    for name in shown:
        method, solver = name.split("/")
        points = [(float(b), c[name]["perplexity"]) for b, c in rows.items() if name in c]
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            linestyle="-" if solver == "ilp" else "--",
            color=colors[method],
            label=titles[name],
        )
    axes.axhline(dense, color="#c0c5ce", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("budget, bits a weight")
    axes.set_ylabel("perplexity (lower is better)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e9f0")
    figure.savefig(path)


def _split_text(tokenizer: Any, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Windows to evaluate on, and samples from the other windows of the same text."""
    from lutjax.cli.models import evaluation_text

    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    chosen = windows(ids, settings.window, settings.evaluated)
    every = windows(ids, settings.window, 10**9)
    taken = {row.tobytes() for row in chosen}
    rest = np.stack([row for row in every if row.tobytes() not in taken])
    picked = rest[np.arange(settings.samples) * len(rest) // settings.samples]
    return chosen[:, : settings.evaluated_tokens], picked[:, : settings.sample_tokens]


def _named(params: Any) -> list[tuple[str, Any]]:
    from lutjax.paths import named_leaves

    return named_leaves(params)


def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    return tree


def main() -> None:
    """Reads the options and runs the study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "lutjax-lq-lora"
    )
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    options = vars(parser.parse_args())
    output, cache = options.pop("output"), options.pop("cache")
    run(Settings(**options), cache, output)


if __name__ == "__main__":
    main()
