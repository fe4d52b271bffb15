"""Decoding speed of the dense float32 model and of compressed ones, in one run on this machine.

    python benchmarks/decode.py [--variants dense nf4 nf4-fused gguf llama.cpp qwix] [--rounds 5]

Batch 1, 64 tokens a round after a short prompt; the variants take turns, so that whatever else the
machine does hits all of them; the median over rounds counts. Prints JSON with the ratio to dense.
``-embed8`` has the embedding, which is the output head too, in 8-bit integers, else it is dense.
``-fused`` joins the projections that multiply the same activations (`lutjax.fuse_projections`).
``llama.cpp`` runs the same GGUF file with a thread a core, if `xllamacpp` is installed; ``qwix``
the same model with Qwix's 4-bit NormalFloat weights in tiles of 64, if `qwix` is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lutjax
from lutjax.io import demo_model_path
from lutjax.models import Decoder, DecoderConfig, decode_step, greedy, init_cache, prefill

PROMPT = "The capital of France is"


def variants(dense: Any) -> dict[str, Callable[[], Any]]:
    return {
        "dense": lambda: dense,
        "nf8": lambda: lutjax.quantize(dense, bits=8, codebook="nf"),
        "nf4": lambda: lutjax.quantize(dense, bits=4),
        "nf3": lambda: lutjax.quantize(dense, bits=3),
        "nf4-embed8": lambda: lutjax.quantize(dense, bits=4, embedding_bits=8),
        "nf3-embed8": lambda: lutjax.quantize(dense, bits=3, embedding_bits=8),
        "higgs4": lambda: lutjax.quantize(dense, lutjax.Recipe.higgs(4)),
        "higgs3": lambda: lutjax.quantize(dense, lutjax.Recipe.higgs(3)),
        "gguf": lambda: lutjax.load(demo_model_path(), keep_quantized=True)[1],
    }


def qwix_nf4(model: Decoder, dense: Any) -> tuple[Callable, Any]:
    """The model as Qwix runs it, and its parameters."""
    import qwix

    rule = qwix.QuantizationRule(module_path=r".*_proj", weight_qtype="nf4", tile_size=64)
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(quantized.init, jax.random.key(0), tokens)["params"]
    return quantized.apply, qwix.quantize_params(dense, shapes)


def decode_round(
    apply_fn: Callable, params: Any, config: DecoderConfig, prompt: list[int], tokens: int
) -> float:
    """Tokens a second of greedy decoding, the prompt not counted."""
    cache = init_cache(config, 1, 128, config.dtype)
    ids = np.zeros((1, 16), np.int32)
    ids[0, : len(prompt)] = prompt
    mask = np.arange(16)[None] < len(prompt)
    logits, cache = prefill(params, ids, mask, cache, apply_fn=apply_fn)
    chosen = jax.block_until_ready(greedy(logits))
    start = time.perf_counter()
    for _ in range(tokens):
        logits, cache = decode_step(params, chosen, cache, apply_fn=apply_fn)
        chosen = greedy(logits)
    jax.block_until_ready(chosen)
    return tokens / (time.perf_counter() - start)


def llama_cpp_round() -> Callable[[int], float]:
    """Tokens a second of llama.cpp, by its own clock, the prompt not counted."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(demo_model_path())
    settings.n_ctx, settings.n_parallel = 128, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = os.cpu_count()
    settings.verbosity = 0
    server = xllamacpp.Server(settings)

    def run(tokens: int) -> float:
        request = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        return server.handle_completions(request)["timings"]["predicted_per_second"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=["dense", "nf4", "nf3"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    names = variants(None)
    for name in arguments.variants:
        if name not in ("llama.cpp", "qwix") and name.removesuffix("-fused") not in names:
            known = ", ".join(names)
            parser.error(f"unknown variant {name}; use {known}, llama.cpp, qwix, or ...-fused")

    from lutjax.cli.models import lifted_if_needed

    model, dense, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    runs: dict[str, Callable[[int], float]] = {}
    for name in arguments.variants:
        if name == "llama.cpp":
            runs[name] = llama_cpp_round()
            runs[name](2)
            continue
        if name == "qwix":
            apply_fn, params = qwix_nf4(model, dense)
        else:
            params = variants(dense)[name.removesuffix("-fused")]()
            if name.endswith("-fused"):
                params = lutjax.fuse_projections(params)
            apply_fn = lifted_if_needed(model.apply, params)

        def run(tokens: int, params: Any = params, apply_fn: Callable = apply_fn) -> float:
            return decode_round(apply_fn, params, model.config, prompt, tokens)

        start = time.perf_counter()
        run(2)
        print(f"{name}: compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        runs[name] = run
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            speeds[name].append(run(arguments.tokens))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "tokens_per_second": medians,
        "rounds": speeds,
    }
    if "dense" in medians:
        # Ratios are taken within a round, where both met the same conditions.
        result["ratio_to_dense"] = {
            name: statistics.median(a / b for a, b in zip(values, speeds["dense"], strict=True))
            for name, values in speeds.items()
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
