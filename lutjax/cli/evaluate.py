"""`lutjax eval`: perplexity, bits a weight and size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from lutjax.transforms import Summary


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measure models: perplexity on a text, bits a weight, size.

    The text is cut into windows; each is read on its own, and every token but its first is
    predicted.

    For example:

    lutjax eval smol-4bit

    lutjax eval ./model model-4bit model-3bit --text book.txt --chunks 32

    lutjax eval model.gguf --keep-quantized --json
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Directories, .gguf files or hub ids."""
    text: Path | None = None
    """UTF-8 text file; by default the help topics that come with Python."""
    window: int = 512
    """Tokens in a window."""
    chunks: int = 16
    """Windows, evenly spaced over the text; all if it has fewer."""
    json: bool = False
    """Print JSON instead of a table."""
    keep_quantized: bool = False
    """Run matrices that are quantised already (GGUF, GPTQ, AWQ, bitsandbytes, compressed-tensors,
    FP8, NVFP4, MXFP4) as they are, not dequantised."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of activations and of what is not compressed; accelerators are fast in bfloat16. By default
    float32, or what a compressed model was saved for."""
    sparsity: Path | None = None
    """Plan of `lutjax sparsify`: ignore small activations, for all tokens."""

    def run(self) -> None:
        """Measures each model and prints the results."""
        from lutjax.cli.inspect import summary_of
        from lutjax.cli.models import evaluation_text

        if not self.models:
            raise ValueError("name at least one model")
        text = evaluation_text(self.text)
        # From the headers of all of them, before the first one runs.
        sizes = [summary_of(model, keep_quantized=self.keep_quantized) for model in self.models]
        results = [
            self._measure(model, text, size) for model, size in zip(self.models, sizes, strict=True)
        ]
        if self.json:
            print(json.dumps(results, indent=2))
            return
        width = max(len("model"), *(len(result["model"]) for result in results))
        print(f"{'model':<{width}}  {'perplexity':>10}  {'bits/weight':>11}  {'MB':>8}  tokens")
        for r in results:
            print(
                f"{r['model']:<{width}}  {r['perplexity']:>10.4f}  {r['bits_per_weight']:>11.3f}  "
                f"{r['megabytes']:>8.1f}  {r['tokens']}"
            )

    def _measure(self, path: str, text: str, summary: Summary) -> dict[str, Any]:
        from lutjax.cli.models import load_model, text_windows
        from lutjax.evaluate import perplexity

        model = load_model(path, keep_quantized=self.keep_quantized, dtype=self.dtype)
        if self.sparsity is not None:
            from lutjax.cli.sparsify import apply_plan

            model = apply_plan(model, self.sparsity, decode_only=False)
        rows = text_windows(text, model.tokenizer, model.config, self.window, self.chunks)
        result = perplexity(model.apply_fn, model.params, rows, progress=True)
        matrices = summary.compressed if summary.compressed.leaves else summary
        return {
            "model": path,
            "perplexity": result.perplexity,
            "mean_nll": result.mean_nll,
            "tokens": result.tokens,
            "window_nll": list(result.window_nll),
            "bits_per_weight": matrices.bits_per_weight,
            "megabytes": summary.nbytes / 1e6,
        }
