"""Plans: a configuration for each matrix, under a budget. A plan is a recipe."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lutjax.allocate.budget import Budget
from lutjax.allocate.grid import fits, gaussian_error, stored_bytes
from lutjax.allocate.solvers import SOLVERS, InfeasibleBudgetError
from lutjax.files import replace_file
from lutjax.transforms.recipe import LutConfig, Recipe, Rule


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight that is planned: its path and the shape it is stored in.

    Attributes:
      path: Parameter path.
      k: Rows of the stored matrix, the contraction axis.
      n: Columns.
      count: Stacked matrices under this path; they share one configuration.
      axis: Contraction axes as in :class:`lutjax.Rule`, if not the default ones.
      batch_ndim: Stacked axes as in :class:`lutjax.Rule`, if not the default ones.
    """

    path: str
    k: int
    n: int
    count: int = 1
    axis: int | tuple[int, ...] | None = None
    batch_ndim: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.count * self.k * self.n

    def nbytes(self, config: LutConfig) -> int:
        """Bytes of this weight when stored with a configuration."""
        return self.count * stored_bytes(self.k, self.n, config)

    def adapter_bytes(self, rank: int, itemsize: int = 2) -> int:
        """Bytes of a low-rank part ``[K, r] @ [r, N]`` with numbers of ``itemsize`` bytes."""
        return self.count * rank * (self.k + self.n) * itemsize


@dataclasses.dataclass(frozen=True)
class CostTable:
    """What each configuration would cost each matrix; the input of :func:`allocate`.

    Attributes:
      matrices: The M matrices.
      candidates: The J configurations.
      costs: ``float64[M, J]``, the growth of the loss or the squared error; inf where a
        configuration does not fit a matrix.
    """

    matrices: tuple[Matrix, ...]
    candidates: tuple[LutConfig, ...]
    costs: Float[np.ndarray, "m j"]

    def __post_init__(self):
        shape = (len(self.matrices), len(self.candidates))
        if np.shape(self.costs) != shape or 0 in shape:
            raise ValueError(
                f"costs have the shape {np.shape(self.costs)}, but there are {shape[0]} matrices "
                f"and {shape[1]} candidates; neither may be empty"
            )
        for matrix, row in zip(self.matrices, np.asarray(self.costs), strict=True):
            if np.isnan(row).any():
                raise ValueError(f"a cost of {matrix.path!r} is NaN; measure it again")
            if not np.isfinite(row).any():
                raise ValueError(
                    f"no candidate fits {matrix.path!r} with K={matrix.k}, N={matrix.n}; add one "
                    f"with a smaller group size or group_size='column'"
                )

    @classmethod
    def of_shapes(cls, matrices: Sequence[Matrix], candidates: Sequence[LutConfig]) -> CostTable:
        """Costs for weights that are known by shape only: as if they were all normal.

        The cost is the squared error of quantising so many independent unit normal numbers.
        """
        return cls._of_weights(matrices, candidates, [m.size for m in matrices])

    @classmethod
    def of_sensitivities(
        cls,
        matrices: Sequence[Matrix],
        candidates: Sequence[LutConfig],
        sensitivities: Mapping[str, float],
    ) -> CostTable:
        r"""Costs by the linearity theorem: the loss grows by :math:`\alpha_l t_{lj}^2`.

        The relative squared error :math:`t_{lj}^2` is that of normal weights, which rotated ones
        nearly are; so nothing has to be quantised to plan.

        Args:
          matrices: The M matrices.
          candidates: The J configurations, for example :func:`higgs_grid`.
          sensitivities: :math:`\alpha_l` of each path, as
            :func:`lutjax.calibrate.noise_sensitivities` measures them.

        Raises:
          ValueError: If a path has none, or one is negative or not finite.

        Source: HIGGS (arXiv 2411.17525, sections 4 and 5).

        >>> matrices = [Matrix("a", 512, 4096), Matrix("b", 512, 4096)]
        >>> configs = [LutConfig.higgs(2), LutConfig.higgs(4)]
        >>> table = CostTable.of_sensitivities(matrices, configs, {"a": 3.0, "b": 1.0})
        >>> [choice.config.bits / 2 for choice in allocate(table, 3.05).choices]
        [4.0, 2.0]
        """
        for matrix in matrices:
            if matrix.path not in sensitivities:
                raise ValueError(f"there is no sensitivity for {matrix.path!r}; measure it too")
            if not 0 <= sensitivities[matrix.path] < math.inf:
                raise ValueError(
                    f"the sensitivity of {matrix.path!r} is {sensitivities[matrix.path]}; it must "
                    f"be a number that is not negative"
                )
        return cls._of_weights(matrices, candidates, [sensitivities[m.path] for m in matrices])

    @classmethod
    def _of_weights(
        cls,
        matrices: Sequence[Matrix],
        candidates: Sequence[LutConfig],
        weights: Sequence[float],
    ) -> CostTable:
        """The relative errors on normal numbers, times a weight for each matrix."""
        costs = [
            [w * gaussian_error(c, m.k) if fits(m.k, c) else math.inf for c in candidates]
            for m, w in zip(matrices, weights, strict=True)
        ]
        return cls(tuple(matrices), tuple(candidates), np.array(costs))

    def sizes(self) -> Int[np.ndarray, "m j"]:
        """``int64[M, J]``, stored bytes."""
        return np.array([[m.nbytes(c) for c in self.candidates] for m in self.matrices])


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a plan chose for one matrix."""

    matrix: Matrix
    config: LutConfig
    cost: float

    @property
    def nbytes(self) -> int:
        """Stored bytes of the quantised matrix."""
        return self.matrix.nbytes(self.config)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of weights."""
        return 8 * self.nbytes / self.matrix.size


@dataclasses.dataclass(frozen=True, repr=False)
class Plan(Recipe):
    """A recipe with one rule for each planned matrix, and what it takes and costs.

    Hand it to :func:`lutjax.quantize` or :func:`lutjax.decompose` like any recipe; its JSON file is
    a recipe file. ``str(plan)`` is a table by matrix, :meth:`by_kind` a short one.

    Attributes:
      choices: What was chosen, matrix by matrix.
      budget: The budget it keeps.
      solver: How it was found.
    """

    choices: tuple[Choice, ...] = dataclasses.field(kw_only=True)
    budget: Budget = dataclasses.field(kw_only=True)
    solver: str = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, choices: Iterable[Choice], budget: Budget, solver: str) -> Plan:
        """The plan of some choices; paths without one stay dense."""
        choices = tuple(choices)
        rules = tuple(
            Rule(c.matrix.path, c.config, c.matrix.axis, c.matrix.batch_ndim) for c in choices
        )
        return cls(rules, choices=choices, budget=budget, solver=solver)

    @property
    def recipe(self) -> Recipe:
        """The bare recipe."""
        return Recipe(self.rules, self.dense, self.embeddings)

    @property
    def size(self) -> int:
        """Number of planned weights."""
        return sum(choice.matrix.size for choice in self.choices)

    @property
    def nbytes(self) -> int:
        """Stored bytes of the planned matrices."""
        return sum(choice.nbytes for choice in self.choices)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the planned matrices divided by their weights."""
        return 8 * self.nbytes / self.size

    @property
    def cost(self) -> float:
        """The sum of costs."""
        return sum(choice.cost for choice in self.choices)

    def to_json(self) -> str:
        """The plan as JSON; :meth:`lutjax.Recipe.from_json` reads it too."""
        data = json.loads(self.recipe.to_json())
        data["plan"] = {
            "solver": self.solver,
            "budget": dataclasses.asdict(self.budget),
            "bits_per_weight": self.bits_per_weight,
            "nbytes": self.nbytes,
            "cost": self.cost,
            "matrices": [dataclasses.asdict(c.matrix) | {"cost": c.cost} for c in self.choices],
        }
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads what :meth:`to_json` wrote.

        Raises:
          ValueError: If the text is no plan.
        """
        recipe = Recipe.from_json(text)
        try:
            plan = json.loads(text)["plan"]
            choices = []
            for rule, fields in zip(recipe.rules, plan["matrices"], strict=True):
                cost = fields.pop("cost")
                if isinstance(fields["axis"], list):
                    fields["axis"] = tuple(fields["axis"])
                if rule.config is None or fields["path"] != rule.pattern:
                    raise ValueError(f"rule {rule.pattern!r} is not for {fields['path']!r}")
                choices.append(Choice(Matrix(**fields), rule.config, cost))
            return cls(
                recipe.rules,
                recipe.dense,
                recipe.embeddings,
                choices=tuple(choices),
                budget=Budget(**plan["budget"]),
                solver=plan["solver"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a plan: {error}; `lutjax allocate -o` writes one") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON file, at once."""
        replace_file(path, self.to_json())

    def by_kind(self) -> str:
        """A table by kind of matrix, the last two parts of its path but ``kernel``."""
        kinds: dict[str, list[Choice]] = collections.defaultdict(list)
        for choice in self.choices:
            kinds[kind_of(choice.matrix.path)].append(choice)
        width = max(len("kind"), *map(len, kinds))
        lines = [
            f"{'kind':<{width}}  {'matrices':>8}  {'bits/weight':>11}  {'least':>6}  {'most':>6}"
        ]
        for kind, choices in kinds.items():
            bits = [c.bits_per_weight for c in choices]
            mean = 8 * sum(c.nbytes for c in choices) / sum(c.matrix.size for c in choices)
            lines.append(
                f"{kind:<{width}}  {len(choices):>8}  {mean:>11.3f}  {min(bits):>6.3f}  "
                f"{max(bits):>6.3f}"
            )
        return "\n".join([*lines, self._total()])

    def __str__(self) -> str:
        """A table with a line for each matrix."""
        width = max(len("parameter"), *(len(c.matrix.path) for c in self.choices))
        lines = [
            f"{'parameter':<{width}}  {'bits/weight':>11}  {'code':>7}  {'group':>6}  "
            f"{'scales':>22}  {'cost':>10}"
        ]
        for c in self.choices:
            second = c.config.double_quant
            scales = (
                c.config.scale_dtype
                if second is None
                else f"{second.bits} bits / {second.block} {second.dtype}"
            )
            lines.append(
                f"{c.matrix.path:<{width}}  {c.bits_per_weight:>11.3f}  {_code(c.config):>7}  "
                f"{c.config.group_size:>6}  {scales:>22}  {c.cost:>10.4g}"
            )
        return "\n".join([*lines, self._total()])

    def __repr__(self) -> str:
        """Number of matrices, bits and budget."""
        return (
            f"Plan({len(self.choices)} matrices, {self.bits_per_weight:.3f} bits a weight, "
            f"solver={self.solver!r})"
        )

    def _total(self) -> str:
        return (
            f"{len(self.choices)} matrices, {self.size:,} weights: {self.nbytes:,} bytes, "
            f"{self.bits_per_weight:.4f} bits a weight, cost {self.cost:.6g} ({self.solver})"
        )


def allocate(table: CostTable, budget: Budget | float, *, solver: str = "ilp") -> Plan:
    """Chooses a configuration for each matrix so that the summed cost is least under a budget.

    Sizes are those of the stored arrays, to the byte, so the budget is kept by what is saved.

    Args:
      table: Costs, from :func:`lutjax.calibrate.measure_costs` or :meth:`CostTable.of_shapes`.
      budget: Bits a weight, or a :class:`Budget` in bytes or with other things counted.
      solver: ``"ilp"``, ``"dp"``, ``"greedy"``, or ``"uniform"`` for one configuration for all.

    Returns:
      The plan, a recipe.

    Raises:
      InfeasibleBudgetError: If no choice fits the budget; the message names the smallest that does.
      ValueError: If the solver is unknown.

    Source: LQ-LoRA (arXiv 2311.12023, section 3.2).

    >>> table = CostTable.of_shapes([Matrix("a", 64, 64), Matrix("b", 64, 64)],
    ...                             [LutConfig(2, 64), LutConfig(4, 64)])
    >>> sorted(choice.config.bits for choice in allocate(table, 3.5).choices)
    [2, 4]
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    if not isinstance(budget, Budget):
        budget = Budget(bits_per_weight=float(budget))
    weights = sum(matrix.size for matrix in table.matrices)
    sizes = table.sizes()
    try:
        chosen = SOLVERS[solver](np.asarray(table.costs), sizes, budget.limit(weights))
    except InfeasibleBudgetError as error:
        wanted = budget.nbytes if budget.bits_per_weight is None else budget.bits_per_weight
        unit = "bytes" if budget.bits_per_weight is None else "bits a weight"
        raise InfeasibleBudgetError(
            f"a budget of {wanted} {unit} is too small for these matrices and candidates; the "
            f"smallest feasible one is {budget.describe(error.smallest, weights)}",
            error.smallest,
        ) from error
    choices = [
        Choice(matrix, table.candidates[j], float(table.costs[i, j]))
        for i, (matrix, j) in enumerate(zip(table.matrices, chosen, strict=True))
    ]
    return Plan.of(choices, budget, solver)


def _code(config: LutConfig) -> str:
    """Bits of a code, and for how many weights it stands if it is for several."""
    return f"{config.bits}" if config.vector_size == 1 else f"{config.bits} / {config.vector_size}"


def kind_of(path: str) -> str:
    """What kind of matrix a path names: ``layers/3/mlp/up_proj/kernel`` is ``up_proj``.

    >>> kind_of("layers/3/mlp/up_proj/kernel")
    'up_proj'
    """
    parts = [p for p in path.split("/") if not p.isdigit() and p not in ("kernel", "weight")]
    return parts[-1] if parts else path
