"""`lutjax allocate`: which configuration for which matrix under a budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lutjax.cli.decompose import single_threaded_lapack
from lutjax.cli.options import check_plot, refuse_beside, refuse_without

if TYPE_CHECKING:
    from lutjax import LutConfig
    from lutjax.allocate import Budget, CostTable, Matrix
    from lutjax.io import Tokenizer
    from lutjax.models import Decoder

_LOW_RANK = ("rank", "rounds", "candidates", "fisher", "workers", "count_adapters")
_MEASURED = ("rounds", "candidates", "fisher", "text", "samples", "window", "cache", "workers")


@dataclasses.dataclass(frozen=True)
class Allocate:
    """Plan which matrix gets how many bits, so that the whole keeps a budget.

    Each matrix is decomposed with each candidate to see what that costs; an integer program then
    picks. With --higgs, the plan is for `lutjax quantize` instead: the cost is how much the loss on
    --text grows with noise in that matrix. With --shapes, nothing is measured: the plan is for
    normal weights of those shapes.

    For example:

    lutjax allocate ./model --budget 2.75 --rank 64 -o plan.json --plot plan.png

    lutjax allocate ./model --higgs --text book.txt --budget 3.25 -o plan.json

    lutjax allocate --shapes llama-2-70b --budget 2.75
    """

    model: tyro.conf.Positional[str | None] = None
    """Directory, .gguf file or hub id of the dense model."""
    shapes: str | None = None
    """Instead of a model: llama-2-7b, llama-2-70b, ..., or a config.json."""
    budget: float | None = None
    """Bits a weight."""
    budget_mb: float | None = None
    """Instead: megabytes (10^6 bytes)."""
    count_adapters: bool = False
    """Count the low-rank parts towards the budget."""
    count_embeddings: bool = False
    """Count embeddings, head and norms towards the budget."""
    higgs: bool = False
    """Rotated weights without low-rank parts, 2 to 8 bits; needs --text."""
    solver: Literal["ilp", "dp", "greedy", "uniform"] = "ilp"
    """ilp: integer programming; uniform: one configuration for all."""
    rank: int = 64
    """Inner size of the low-rank parts."""
    rounds: int = 5
    """Most rounds of each measured decomposition."""
    candidates: int = 12
    """How many configurations to measure, of those that no other beats."""
    fisher: Path | None = None
    """File with Fisher information; made from --text if it does not exist."""
    text: Path | None = None
    """UTF-8 text file to calibrate on."""
    samples: int | None = None
    """Windows of the text to calibrate on; 128, with --higgs 4, for each of which the model runs
    twice a matrix."""
    window: int = 256
    """Tokens in each of them."""
    cache: Path | None = None
    """File that keeps what was measured; a stopped run goes on where it was."""
    workers: int = 1
    """Decompositions at the same time."""
    seed: int = 0
    """Of the randomised decompositions."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """JSON file to write the plan to; `lutjax decompose --plan` and `quantize --recipe` read it."""
    plot: Path | None = None
    """Picture to write: bits of each matrix over depth."""
    full: bool = False
    """Print a line for each matrix instead of each kind."""

    def run(self) -> None:
        """Plans, prints the plan and its sizes, and writes the files."""
        single_threaded_lapack()
        from lutjax.allocate import allocate, plot_plan
        from lutjax.arrays import format_bytes

        if (self.model is None) == (self.shapes is None):
            raise ValueError("name either a MODEL or --shapes")
        if (self.budget is None) == (self.budget_mb is None):
            raise ValueError("give either --budget or --budget-mb")
        if self.shapes is not None:
            refuse_beside(self, "--shapes", *_MEASURED)
        if self.text is None:
            refuse_without(self, "--text", "samples", "window")
        if self.higgs:
            refuse_beside(self, "--higgs", *_LOW_RANK)
            if self.model is not None and self.text is None:
                raise ValueError("--higgs measures on a text; name one with --text")
        check_plot(self.plot)
        for file in (self.output, self.plot):
            if file is not None and not file.absolute().parent.is_dir():
                raise FileNotFoundError(f"the directory of {file} does not exist")
        # Sizes first: a budget that cannot be kept is found before anything is measured.
        table, others = self._costs()
        adapters = self._adapter_bytes(table.matrices)
        plan = allocate(table, self._budget(adapters, *others), solver=self.solver)
        print(plan if self.full else plan.by_kind())
        total = plan.nbytes + others[0] + adapters
        low_rank = (
            ""
            if self.higgs
            else f" + low-rank parts of rank {self.rank} in bfloat16 {format_bytes(adapters)}"
        )
        print(
            f"quantised {format_bytes(plan.nbytes)} + embeddings, head, norms "
            f"{format_bytes(others[0])}{low_rank} = {format_bytes(total)}"
        )
        if self.output is not None:
            plan.save(self.output)
            print(f"plan: {self.output}")
        if self.plot is not None:
            plot_plan(plan, self.plot)
            print(f"plot: {self.plot}")

    def _budget(self, adapters: int, other_bytes: int, other_weights: int) -> Budget:
        from lutjax.allocate import Budget

        return Budget(
            bits_per_weight=self.budget,
            nbytes=None if self.budget_mb is None else int(self.budget_mb * 1e6),
            fixed_bytes=adapters * self.count_adapters + other_bytes * self.count_embeddings,
            fixed_weights=other_weights * self.count_embeddings,
        )

    def _adapter_bytes(self, matrices: tuple[Matrix, ...]) -> int:
        return 0 if self.higgs else sum(m.adapter_bytes(self.rank) for m in matrices)

    def _candidates(self, matrices: tuple[Matrix, ...]) -> tuple[LutConfig, ...]:
        from lutjax.allocate import candidate_grid, higgs_grid, prune
        from lutjax.allocate.grid import fits
        from lutjax.transforms.recipe import MIN_GROUP_SIZE

        if self.higgs:
            # for every matrix the largest group that it has
            largest = {min(512, max(MIN_GROUP_SIZE, 1 << m.k.bit_length() - 1)) for m in matrices}
            return higgs_grid(group_sizes=sorted(largest))
        if self.shapes is not None:
            return prune(candidate_grid())
        # Groups that are larger than the smallest matrix would leave it without a candidate.
        grid = [c for c in candidate_grid() if all(fits(m.k, c) for m in matrices)]
        return prune(grid or candidate_grid(), most=self.candidates)

    def _costs(self) -> tuple[CostTable, tuple[int, int]]:
        """The costs of the matrices, and the bytes and weights of everything else."""
        import jax

        from lutjax import load, summarize
        from lutjax.allocate import CostTable
        from lutjax.calibrate import measure_costs, plannable
        from lutjax.cli.calibration import fisher_for

        if self.model is None:
            assert self.shapes is not None
            params = _abstract_params(self.shapes)
        else:
            model, params, tokenizer = load(self.model)
        matrices = plannable(params)
        candidates = self._candidates(matrices)
        planned = {matrix.path for matrix in matrices}
        others = [leaf for leaf in summarize(params).leaves if leaf.path not in planned]
        sizes = (sum(leaf.nbytes for leaf in others), sum(leaf.size for leaf in others))
        if self.model is None:
            return CostTable.of_shapes(matrices, candidates), sizes
        self._check_feasible(matrices, candidates, sizes)
        if self.higgs:
            sensitivities = self._sensitivities(model, params, tokenizer)
            return CostTable.of_sensitivities(matrices, candidates, sensitivities), sizes
        table = measure_costs(
            params,
            candidates,
            rank=self.rank,
            key=jax.random.key(self.seed),
            fisher=fisher_for(
                self.model,
                self.fisher,
                self.text,
                128 if self.samples is None else self.samples,
                self.window,
            ),
            rounds=self.rounds,
            cache=self.cache,
            workers=self.workers,
            progress=True,
        )
        return table, sizes

    def _sensitivities(
        self, model: Decoder, params: Any, tokenizer: Tokenizer | None
    ) -> dict[str, float]:
        import jax

        from lutjax.calibrate import next_token_loss, noise_sensitivities
        from lutjax.cli.models import evaluation_text, text_windows
        from lutjax.io import require_tokenizer

        tokenizer = require_tokenizer(tokenizer, str(self.model))
        text, count = evaluation_text(self.text), 4 if self.samples is None else self.samples
        return noise_sensitivities(
            next_token_loss(model.apply),
            params,
            list(text_windows(text, tokenizer, model.config, self.window, count)),
            key=jax.random.key(self.seed),
            cache=self.cache,
            progress=True,
        )

    def _check_feasible(
        self,
        matrices: tuple[Matrix, ...],
        candidates: tuple[LutConfig, ...],
        others: tuple[int, int],
    ) -> None:
        from lutjax.allocate import CostTable, allocate

        adapters = self._adapter_bytes(matrices)
        table = CostTable.of_shapes(matrices, candidates)
        solver = "uniform" if self.solver == "uniform" else "greedy"
        allocate(table, self._budget(adapters, *others), solver=solver)


def _abstract_params(name: str) -> dict[str, Any]:
    """The bfloat16 parameters of a known model, or of a config.json, without values."""
    import jax
    import jax.numpy as jnp

    from lutjax.io.checkpoint import nest, parameter_shapes
    from lutjax.io.configs import config_from_hf
    from lutjax.io.safetensors import read_json
    from lutjax.models import MODELS

    if name.endswith(".json"):
        config = config_from_hf(read_json(Path(name)), name)
    elif name in MODELS:
        config = MODELS[name]
    else:
        raise ValueError(f"unknown model {name!r}; known shapes: {', '.join(MODELS)}")
    shapes = parameter_shapes(config)
    return nest({path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()})
