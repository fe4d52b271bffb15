"""`lutjax generate`: text from a prompt."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from lutjax.cli.options import refuse_without


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it with --chat.

    For example:

    lutjax generate smol-4bit --prompt "The capital of France is" --stream

    lutjax generate smol-4bit --chat --prompt "Name three colours." --max-new-tokens 100

    lutjax generate smol-4bit --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1
    """

    model: tyro.conf.Positional[str]
    """Directory, .gguf file or hub id."""
    prompt: str
    """The text to continue; with --chat, what the user says."""
    max_new_tokens: int = 64
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher draws more freely."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability only."""
    seed: int = 0
    """The same seed draws the same text."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    stream: bool = False
    """Print the text while it is made."""
    keep_quantized: bool = False
    """Run matrices that are quantised already (GGUF, GPTQ, AWQ, bitsandbytes, compressed-tensors,
    FP8, NVFP4, MXFP4) as they are, not dequantised."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of activations and of what is not compressed; accelerators are fast in bfloat16. By default
    float32, or what a compressed model was saved for."""
    sparsity: Path | None = None
    """Plan of `lutjax sparsify`: ignore small activations, for the tokens that are generated."""

    def run(self) -> None:
        """Generates, prints the text, and its speed on standard error."""
        if not self.prompt:
            raise ValueError("--prompt is empty; a prompt needs at least one character")
        if not self.temperature:
            refuse_without(self, "--temperature above 0", "top_k", "top_p", "seed")
        import jax

        from lutjax.cli.models import for_inference, load_model
        from lutjax.io import TextStream
        from lutjax.models import generate

        model = load_model(self.model, keep_quantized=self.keep_quantized, dtype=self.dtype)
        if self.sparsity is None:
            model = for_inference(model)
        else:
            from lutjax.cli.sparsify import apply_plan

            model = apply_plan(model, self.sparsity, decode_only=True)
        tokenizer = model.tokenizer
        if self.chat:
            text = tokenizer.render_chat([{"role": "user", "content": self.prompt}])
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = tokenizer.encode(self.prompt)
        stream = TextStream(tokenizer)
        times: list[float] = []

        def on_token(_: int, token: int) -> None:
            times.append(time.perf_counter())
            if self.stream:
                print(stream.push(token), end="", flush=True)

        (tokens,) = generate(
            model.apply_fn,
            model.params,
            [ids],
            config=model.config,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            key=jax.random.key(self.seed),
            stop_tokens=tokenizer.eos_ids,
            on_token=on_token,
        )
        print(stream.finish() if self.stream else tokenizer.decode(tokens))
        if len(times) > 1:
            speed = (len(times) - 1) / (times[-1] - times[0])
            print(f"{len(times)} tokens, {speed:.1f} tokens/s", file=sys.stderr)
