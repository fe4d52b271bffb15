"""`lutjax quantize`: a dense checkpoint to a compressed one."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lutjax.cli.options import refuse_beside, refuse_without

if TYPE_CHECKING:
    from lutjax import Recipe
    from lutjax.models import DecoderConfig

_CODES = ("codebook", "scale_dtype", "double_quant")


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Compress a checkpoint to lookup-table weights, tensor by tensor.

    Weight matrices become packed codes of a small table with a scale for each group; norms stay as
    they are, and so do embeddings and the output head without --embedding-bits.

    For example:

    lutjax quantize HuggingFaceTB/SmolLM2-135M -o smol-4bit

    lutjax quantize ./model -o model-3bit --bits 3 --group-size 128 --embedding-bits 8

    lutjax quantize ./model -o model-3bit --higgs --bits 3 --text book.txt

    lutjax quantize ./model -o model-2bit --bits 2 --text book.txt --learn-scales 1

    lutjax quantize model.gguf -o model-int4 --keep-quantized
    """

    model: tyro.conf.Positional[str]
    """Directory, .gguf file or hub id of the dense model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory to make; it must not exist."""
    bits: float = 4
    """Bits a weight, 1 to 8; with --higgs also 1.5, 2.5 and 3.5."""
    group_size: int | Literal["column"] | None = None
    """Weights that share a scale, at least 16 (64 by default, with --higgs 512, a power of two), or
    'column' for one scale a column."""
    higgs: bool = False
    """Rotate the weights and use the best tables for normal numbers: the least error for 1 to 4
    bits; decoding is slower on a CPU. Instead of a codebook."""
    codebook: str = "default"
    """Table of values: nf (NormalFloat; the default up to 5 bits), int (from 6 bits on), affine,
    fp4, nf_flute, kmeans, gaussian (at 1 bit)."""
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """How the scales are stored."""
    double_quant: bool = False
    """Quantise the scales (and offsets) too, to 8 bits."""
    embedding_bits: int | None = None
    """Bits of embeddings and output head, 2 to 8, which stay dense by default; 8 cost next to
    nothing in quality. Groups of 64 with --higgs."""
    recipe: Path | None = None
    """JSON file with a rule for each kind of parameter, instead of the seven options above."""
    keep_quantized: bool = False
    """Keep matrices that are quantised already exactly (GGUF, GPTQ, AWQ, bitsandbytes,
    compressed-tensors, FP8, NVFP4, MXFP4); compress only the others."""

    text: Path | None = None
    """UTF-8 text to calibrate on: weights are rounded such that products err little on it (GPTQ).
    The whole model is in memory then."""
    samples: int = 64
    """Windows of the text to calibrate on."""
    window: int = 512
    """Tokens in each of them."""
    learn_scales: int = 0
    """Passes over them in which the scales learn to give the dense model's outputs; a pass takes
    the time of training on them. 1 is a good start, the more so the fewer the bits."""

    def run(self) -> None:
        """Compresses, and prints the result's size."""
        from lutjax.cli.calibration import compress_on_text
        from lutjax.cli.inspect import print_compressed
        from lutjax.io import compress_checkpoint

        if self.text is None:
            refuse_without(self, "--text", "samples", "window", "learn_scales")
            compress_checkpoint(
                self.model,
                self.output,
                self._recipe(),
                keep_quantized=self.keep_quantized,
                progress=True,
            )
        else:
            refuse_beside(self, "--text", "keep_quantized")
            if self.learn_scales < 0:
                raise ValueError(f"--learn-scales {self.learn_scales} must not be negative")
            compress = functools.partial(self._on_text, self._recipe())
            compress_on_text(
                self.model, self.output, self.text, self.samples, self.window, compress
            )
        print_compressed(self.output, "in {} compressed matrices")

    def _on_text(self, recipe: Recipe, config: DecoderConfig, dense: Any, tokens: Any) -> Any:
        from lutjax.calibrate import learn_scales, quantize_decoder
        from lutjax.models import Decoder

        params = quantize_decoder(config, dense, tokens, recipe, progress=True)
        if self.learn_scales == 0:
            return params
        model = Decoder(config)
        return learn_scales(
            lambda params, tokens: model.apply({"params": params}, tokens),
            params,
            dense,
            [row[None] for row in tokens],
            epochs=self.learn_scales,
            progress=True,
        )

    def _recipe(self) -> Recipe:
        from lutjax import DoubleQuant, Recipe

        if self.recipe is not None:
            refuse_beside(
                self, "--recipe", "bits", "group_size", "higgs", "embedding_bits", *_CODES
            )
            return Recipe.load(self.recipe)
        # what is out of range, the recipe says
        bits: Any = int(self.bits) if float(self.bits).is_integer() else self.bits
        group: dict[str, Any] = {} if self.group_size is None else {"group_size": self.group_size}
        if self.higgs:
            refuse_beside(self, "--higgs", *_CODES)
            recipe = Recipe.higgs(bits, **group)
            embeddings = self.embedding_bits
            return recipe if embeddings is None else recipe.with_embeddings(embeddings)
        return Recipe.uniform(
            bits,
            **group,
            codebook=self.codebook,
            scale_dtype=self.scale_dtype,
            double_quant=DoubleQuant() if self.double_quant else None,
            embedding_bits=self.embedding_bits,
        )
