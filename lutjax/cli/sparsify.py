"""`lutjax sparsify`: a plan of thresholds below which activations are ignored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lutjax.cli.options import check_plot

if TYPE_CHECKING:
    from lutjax.cli.models import RunnableModel


@dataclasses.dataclass(frozen=True)
class Sparsify:
    """Choose, per weight, below which size activations are ignored.

    Calibrates on a text and writes a plan, a JSON file to read and edit; `lutjax eval` and
    `lutjax generate` take it with --sparsity.

    For example:

    lutjax sparsify ./model --target 0.5 --text book.txt -o plan.json

    lutjax eval ./model --sparsity plan.json
    """

    model: tyro.conf.Positional[str]
    """Directory, .gguf file or hub id."""
    target: float
    """Share of the weights to skip, in [0, 1)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Plan to write."""
    text: Path | None = None
    """UTF-8 text file to calibrate on; by default the help topics that come with Python."""
    method: Literal["greedy", "uniform", "wina"] = "greedy"
    """greedy: allocate block by block; uniform: the same sparsity everywhere; wina: uniform, with
    activations weighed by the norms of the rows they meet."""
    samples: int = 8
    """Windows of the text to calibrate on."""
    window: int = 512
    """Tokens in each of them."""
    search_tokens: int = 128
    """Tokens that the greedy search compares outputs on."""
    step: float = 0.005
    """What one step of the greedy search adds to the sparsity of a block."""
    plot: Path | None = None
    """Picture of the sparsity of every projection over depth."""

    def run(self) -> None:
        """Calibrates, writes the plan, and measures it on a window that was not used."""
        import jax.numpy as jnp

        from lutjax.calibrate import activation_quantiles
        from lutjax.cli.models import evaluation_text, load_model, text_windows
        from lutjax.models.blockwise import decoder_blocks
        from lutjax.sparsity import (
            greedy_search,
            measure_sparsity,
            plan_greedy,
            plan_uniform,
            recalibrate,
            sparsify,
        )
        from lutjax.sparsity.thresholds import check_target

        check_target(self.target)
        self._check()
        model = load_model(self.model)
        text, count = evaluation_text(self.text), self.samples + 1
        rows = text_windows(text, model.tokenizer, model.config, self.window, count)
        *batches, held_out = [row[None] for row in rows]
        if not batches:
            raise ValueError(f"the text has fewer than two windows of {self.window} tokens")

        def logits(params: Any, tokens: Any) -> Any:
            return model.apply_fn({"params": params}, tokens)

        score: Any = "wina" if self.method == "wina" else "magnitude"
        quantiles = activation_quantiles(logits, model.params, batches, score=score, progress=True)
        if self.method == "greedy" and self.target > 0:
            tokens = jnp.asarray(batches[0][:, : self.search_tokens])
            fns, blocks, x = decoder_blocks(model.config, model.params, tokens)
            search = greedy_search(
                fns, blocks, x, quantiles, limit=self.target, step=self.step, progress=True
            )
            plan = plan_greedy(model.params, quantiles, search, self.target)
        else:
            plan = plan_uniform(model.params, quantiles, self.target)
        plan = recalibrate(logits, model.params, plan, batches, progress=True)
        plan.save(self.output)
        achieved = measure_sparsity(logits, sparsify(model.params, plan), [held_out])
        print(str(plan).splitlines()[0])
        print(f"{self.output}: {100 * achieved.overall:.1f} % on a window that was not used")
        if self.plot is not None:
            plan.plot(self.plot)

    def _check(self) -> None:
        """Refuses what would fail after the calibration."""
        check_plot(self.plot)
        for path in filter(None, (self.output, self.plot)):
            if path.is_dir():
                raise ValueError(f"{path} is a directory; name a file in it")
            if not path.parent.is_dir():
                raise ValueError(f"{path.parent} is not a directory; make it first")
        for name in ("samples", "window", "search_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        greedy = self.method == "greedy" and self.target > 0
        if greedy and not 0 < self.step <= self.target:
            raise ValueError(
                f"--step {self.step} must be above 0 and at most --target {self.target}"
            )


def apply_plan(model: RunnableModel, plan: Path, *, decode_only: bool) -> RunnableModel:
    """The model under a sparsity plan.

    Args:
      model: a loaded model.
      plan: what `lutjax sparsify` wrote.
      decode_only: whether prompts run on the plain weights, and single tokens alone skip rows.

    Raises:
      ValueError: if the file is no plan, or the plan of another model.
    """
    from lutjax import prepack
    from lutjax.cli.models import lifted_if_needed
    from lutjax.sparsity import PhasedParams, SparsityPlan, phased, sparsify

    gated = sparsify(model.params, SparsityPlan.load(plan))
    apply_fn = lifted_if_needed(model.apply_fn, gated)
    if not decode_only:
        return dataclasses.replace(model, params=gated, apply_fn=apply_fn)
    # GPUs and TPUs skip rows of another layout; they then hold those weights twice.
    both = PhasedParams(model.params, prepack(gated))
    return dataclasses.replace(model, params=both, apply_fn=phased(apply_fn))
