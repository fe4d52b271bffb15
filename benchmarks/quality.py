"""Perplexity of SmolLM2-135M-Instruct at several sizes, beside figures from outside.

    python benchmarks/quality.py [--only nf4_g64 ...] [--output DIR]

Writes quality.json and quality.md. The outside figures were computed with transformers 5.23 on
torch 2.13 (float32, CPU) on the same 16 windows of 512 tokens, all 210 matrices of the layers
quantised with float32 scales, everything else float32. In int4_sym_g64 0.02 % of the codes differ
from outside, all of them exact ties: outside rounds half to even, here the lower value wins.
`_embed8` has the embedding in 8-bit integers, and no outside figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import lutjax
from lutjax.evaluate import perplexity, windows
from lutjax.io import demo_model_path
from lutjax.transforms.summarize import Summary

OUTSIDE = {
    "dense": 14.000147,
    "nf4_g64": 18.105411,
    "nf4_g128": 18.600402,
    "nf3_g64": 41.238385,
    "int4_sym_g64": 20.665099,
    "int8_sym_g128": 13.993014,
    "int4_asym_g32": 14.000146,
}


def variants(dense: Any) -> dict[str, Callable[[], Any]]:
    """Parameters by the name of the outside figure; `_bf16` has the default scales."""

    def quantized(bits: int, group_size: int, codebook: str = "nf", scale_dtype: str = "float32"):
        return lambda: lutjax.quantize(
            dense, bits=bits, group_size=group_size, codebook=codebook, scale_dtype=scale_dtype
        )

    return {
        "dense": lambda: dense,
        "nf4_g64": quantized(4, 64),
        "nf4_g64_bf16": quantized(4, 64, scale_dtype="bfloat16"),
        "nf4_g128": quantized(4, 128),
        "nf3_g64": quantized(3, 64),
        "nf3_g64_bf16": quantized(3, 64, scale_dtype="bfloat16"),
        "int4_sym_g64": quantized(4, 64, "int"),
        "int8_sym_g128": quantized(8, 128, "int"),
        "int4_asym_g32": quantized(4, 32, "affine"),
        "nf4_g64_bf16_embed8": lambda: lutjax.quantize(dense, bits=4, embedding_bits=8),
        # The blocks of the file, repacked: Q4_1 matrices and the Q8_0 embedding.
        "gguf_blocks": lambda: lutjax.load(demo_model_path(), keep_quantized=True)[1],
    }


def measure(name: str, params: Any, apply_fn: Callable, text: Any) -> dict[str, Any]:
    start = time.perf_counter()
    result = perplexity(apply_fn, params, text, progress=True)
    summary = lutjax.summarize(params)
    matrices = Summary(tuple(leaf for leaf in summary.leaves if "_proj/" in leaf.path))
    reference = {"gguf_blocks": "int4_asym_g32"}.get(name, name.removesuffix("_bf16"))
    outside = OUTSIDE.get(reference) if len(text) == 16 else None
    return {
        "name": name,
        "perplexity": result.perplexity,
        "outside": outside,
        "deviation_percent": None if outside is None else 100 * (result.perplexity / outside - 1),
        "bits_per_weight": matrices.bits_per_weight,
        "megabytes": summary.nbytes / 1e6,
        "seconds": time.perf_counter() - start,
        "window_nll": list(result.window_nll),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | perplexity | outside | deviation | bits/weight | MB |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        outside = "" if r["outside"] is None else f"{r['outside']:.4f}"
        deviation = "" if r["outside"] is None else f"{r['deviation_percent']:+.4f} %"
        lines.append(
            f"| {r['name']} | {r['perplexity']:.4f} | {outside} | {deviation} | "
            f"{r['bits_per_weight']:.3f} | {r['megabytes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()

    from lutjax.cli.models import evaluation_text, lifted_if_needed

    model, dense, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    ids = tokenizer.encode(evaluation_text(), add_special_tokens=False)
    text = windows(ids, 512, arguments.chunks)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "quality.json"
    # Variants that were measured before stay in the table.
    results = json.loads(file.read_text())["results"] if file.is_file() else []
    for name, make in variants(dense).items():
        if arguments.only and name not in arguments.only:
            continue
        params = make()
        result = measure(name, params, lifted_if_needed(model.apply, params), text)
        print(markdown([result]).splitlines()[-1], flush=True)
        order = [*variants(dense)]
        results = [r for r in results if r["name"] != name] + [result]
        results.sort(key=lambda r: order.index(r["name"]))
        data = {"jax": jax.__version__, "tokens_in_text": len(ids), "results": results}
        file.write_text(json.dumps(data, indent=1) + "\n")
        (arguments.output / "quality.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
