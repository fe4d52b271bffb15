"""`lutjax decompose`: a dense checkpoint to quantised plus low-rank weights."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lutjax.cli.options import refuse_beside, refuse_without

if TYPE_CHECKING:
    from lutjax import Recipe


@dataclasses.dataclass(frozen=True)
class Decompose:
    """Split every weight matrix into a quantised part and a low-rank part.

    The low-rank part takes up what quantisation loses, and is what finetuning trains. With a text,
    errors count by how much they matter on it: by Fisher information, or by the products.

    For example:

    lutjax decompose ./model -o model-lq --bits 3 --rank 64

    lutjax decompose ./model -o model-lq --plan plan.json --rank 64 --text book.txt

    lutjax decompose ./model -o model-lq --bits 3 --rank 64 --text book.txt --weighting inputs
    """

    model: tyro.conf.Positional[str]
    """Directory, .gguf file or hub id of the dense model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory to make; it must not exist."""
    rank: int = 64
    """Inner size of the low-rank part."""
    method: Literal["lq", "loftq", "lorc", "svd", "lora"] | None = None
    """lq: alternate until the error rises; loftq: five rounds; lorc: correct the quantisation error
    once; svd: take the largest components out first; lora: quantise and start from zero. By default
    lq, or lorc with --weighting inputs."""
    rounds: int | None = None
    """Most rounds of lq (100) or rounds of loftq (5)."""
    svd: Literal["randomized", "dense"] = "randomized"
    """How singular vectors are found."""
    bits: int = 4
    """Bits of a code, 1 to 8."""
    group_size: int | Literal["column"] = 64
    """Weights that share a scale, at least 16, or 'column' for one scale a column."""
    codebook: str = "default"
    """Table of values: nf (NormalFloat; the default up to 5 bits), int (from 6 bits on), affine,
    fp4, nf_flute, kmeans, gaussian (at 1 bit)."""
    double_quant: bool = False
    """Quantise the scales (and offsets) too, to 8 bits."""
    plan: Path | None = None
    """Plan of `lutjax allocate`, or another recipe, instead of the four options above."""
    fisher: Path | None = None
    """File with Fisher information; made from --text if it does not exist."""
    text: Path | None = None
    """UTF-8 text file to calibrate on."""
    weighting: Literal["fisher", "inputs"] = "fisher"
    """What errors count by on the text. fisher: each weight's information. inputs: the products of
    each block, after those before it; codes are rounded with error feedback (GPTQ), and the whole
    model is in memory."""
    samples: int = 128
    """Windows of the text to calibrate on."""
    window: int = 256
    """Tokens in each of them."""
    seed: int = 0
    """Of the randomised decompositions."""

    def run(self) -> None:
        """Decomposes, and prints the result's size and error."""
        single_threaded_lapack()
        from lutjax.cli.inspect import print_compressed

        recipe = self._recipe()
        if self.text is None:
            refuse_without(self, "--text", "samples", "window")
        error = self._by_inputs(recipe) if self.weighting == "inputs" else self._by_fisher(recipe)
        print_compressed(self.output, "with the low-rank parts in {} matrices" + error)

    def _by_fisher(self, recipe: Recipe) -> str:
        import jax
        import numpy as np

        from lutjax.cli.calibration import fisher_for
        from lutjax.io.decompose import decompose_checkpoint
        from lutjax.io.new_directory import check_destination

        check_destination(self.output)
        errors = decompose_checkpoint(
            self.model,
            self.output,
            recipe,
            rank=self.rank,
            method=self.method or "lq",
            key=jax.random.key(self.seed),
            fisher=fisher_for(self.model, self.fisher, self.text, self.samples, self.window),
            rounds=self.rounds,
            svd=self.svd,
            progress=True,
        )
        return f", error {float(np.linalg.norm(list(errors.values()))):.4g}"

    def _by_inputs(self, recipe: Recipe) -> str:
        import jax

        from lutjax.calibrate import decompose_decoder
        from lutjax.cli.calibration import compress_on_text

        if self.text is None:
            raise ValueError("--weighting inputs needs a text; name one with --text")
        refuse_beside(self, "--weighting inputs", "fisher")
        compress_on_text(
            self.model,
            self.output,
            self.text,
            self.samples,
            self.window,
            lambda config, params, tokens: decompose_decoder(
                config,
                params,
                tokens,
                recipe,
                rank=self.rank,
                method=self.method or "lorc",
                key=jax.random.key(self.seed),
                rounds=self.rounds,
                svd=self.svd,
                progress=True,
            ),
        )
        return ""

    def _recipe(self) -> Recipe:
        from lutjax import DoubleQuant, Recipe

        if self.plan is None:
            second = DoubleQuant() if self.double_quant else None
            return Recipe.uniform(self.bits, self.group_size, self.codebook, double_quant=second)
        refuse_beside(self, "--plan", "bits", "group_size", "codebook", "double_quant")
        return Recipe.load(self.plan)


def single_threaded_lapack() -> None:
    """Keeps LAPACK's threads from waiting for each other; before jax is first imported.

    On thin matrices, one thread is many times faster than several on busy cores.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
