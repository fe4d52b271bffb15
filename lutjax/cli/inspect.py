"""`lutjax inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from lutjax.transforms import Summary


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List a model's parameters: shape, bits a weight, bytes, and how each is stored.

    Only headers are read, so this is quick for a model of any size.

    For example:

    lutjax inspect smol-4bit

    lutjax inspect model.gguf --keep-quantized --json
    """

    model: tyro.conf.Positional[str]
    """Directory, .gguf file or hub id."""
    json: bool = False
    """Print JSON instead of a table."""
    keep_quantized: bool = False
    """Show matrices that are quantised already as they are, not dequantised."""

    def run(self) -> None:
        """Prints the table."""
        summary = summary_of(self.model, keep_quantized=self.keep_quantized)
        print(summary.to_json() if self.json else summary)


def summary_of(path: str, *, keep_quantized: bool = False) -> Summary:
    """The parameters of a checkpoint of any kind, as `lutjax.load` would give them.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the checkpoint is not sound or not supported.
    """
    from lutjax.io import open_checkpoint, open_compressed
    from lutjax.io.checkpoint import nest
    from lutjax.io.compressed import is_compressed_directory
    from lutjax.io.grid import abstract_params, kept_paths
    from lutjax.transforms import summarize

    specs: dict[str, Any]
    if is_compressed_directory(Path(path)):
        compressed = open_compressed(path)
        specs = {name: compressed.abstract(name) for name in compressed.descriptions}
    else:
        checkpoint = open_checkpoint(path)
        specs = abstract_params(checkpoint, kept_paths(checkpoint, keep_quantized))
    return summarize(nest(specs))


def print_compressed(output: Path, what: str) -> None:
    """Prints the size of a checkpoint that was made, and whether matrices in it stayed dense.

    Args:
      output: the checkpoint.
      what: the end of the line; `{}` stands for the number of compressed matrices.
    """
    from lutjax import Recipe
    from lutjax.arrays import format_bytes

    summary = summary_of(str(output))
    found = summary.compressed
    print(
        f"{output}: {format_bytes(summary.nbytes)}, {found.bits_per_weight:.3f} bits a weight "
        + what.format(len(found.leaves))
    )
    default = Recipe.uniform()
    paths = [
        leaf.path
        for leaf in summary.leaves
        if not leaf.compressed and len(leaf.shape) > 1 and default.rule_for(leaf.path)
    ]
    if paths:
        print(f"{len(paths)} matrices stay dense, such as {paths[0]}")
