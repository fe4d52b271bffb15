"""A decoder's parameters on disk: checked by their headers, read one at a time."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lutjax.io import gpt_oss
from lutjax.io.blocks import GridBlocks, GridSpec
from lutjax.io.configs import config_from_gguf
from lutjax.io.gguf import GGUFReader
from lutjax.io.names import CheckpointFormat, checkpoint_name, is_ignored, is_transposed
from lutjax.io.readers import TensorReader
from lutjax.io.safetensors import FLOAT_TYPES
from lutjax.models.config import DecoderConfig
from lutjax.models.decoder import abstract_params
from lutjax.paths import named_leaves


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers fit the decoder; values are read on demand.

    Iterating over `shapes` and calling `read` holds one parameter at a time.

    Attributes:
      source: the path it was opened from.
      config: the decoder's configuration.
      fmt: `"hf"`, `"gguf"` or `"lutjax"`.
      reader: the tensors by their names in the checkpoint.
      shapes: the shape of each parameter by path, e.g. `layers/0/mlp/up_proj/kernel`.
      allow_nonfinite: whether `read` gives NaN and Inf as they are.
    """

    source: Path
    config: DecoderConfig
    fmt: CheckpointFormat
    reader: TensorReader
    shapes: Mapping[str, tuple[int, ...]]
    allow_nonfinite: bool = False

    @classmethod
    def create(
        cls,
        source: Path,
        config: DecoderConfig,
        fmt: CheckpointFormat,
        reader: TensorReader,
        *,
        allow_nonfinite: bool = False,
    ) -> Checkpoint:
        """Checks that the checkpoint has every parameter in the right shape, and nothing else.

        Raises:
          ValueError: naming the tensor that is missing, misshapen, of an unsupported dtype, or
            that the decoder has no place for.
        """
        shapes = parameter_shapes(config)
        expected = {_stored_name(path, config, fmt, reader): path for path in shapes}
        for name, path in expected.items():
            transposed = fmt != "lutjax" and is_transposed(path)
            _check_tensor(source, reader, name, shapes[path], transposed, fmt)
        head = checkpoint_name("lm_head/kernel", fmt)
        for name in reader.infos:
            tied_copy = name == head and config.tie_embeddings
            if name in expected or is_ignored(name) or tied_copy:
                continue
            if reader.is_zero_bias(name):
                continue
            raise ValueError(
                f"{source}: tensor {_label(reader, name)} has no place in a "
                f"{config.model_type!r} decoder of {config.num_layers} layers"
            )
        return cls(source, config, fmt, reader, shapes, allow_nonfinite)

    def name(self, path: str) -> str:
        """The name in the checkpoint of the parameter at `path`."""
        return _stored_name(path, self.config, self.fmt, self.reader)

    def abstract(self, path: str) -> jax.ShapeDtypeStruct:
        """The shape of one parameter, and the dtype that it is kept in, from the headers alone.

        That is the stored dtype, and float32 for float64 and for what is quantised.
        """
        dtype = self.reader.dtype(self.name(path))
        return jax.ShapeDtypeStruct(
            self.shapes[path], np.dtype(np.float32) if dtype == np.float64 else dtype
        )

    def read(self, path: str) -> np.ndarray:
        """Reads one parameter in the decoder's layout (kernels `[in, out]`).

        Returns:
          An array of the stored float dtype (float32 if it was quantised); it may be a view that
          is not contiguous.

        Raises:
          ValueError: if it holds NaN or Inf and `allow_nonfinite` is not set.
        """
        name = self.name(path)
        tensor = self.reader.read(name)
        if not self.allow_nonfinite and not np.isfinite(tensor).all():
            count = tensor.size - int(np.isfinite(tensor).sum())
            raise ValueError(
                f"{self.source}: tensor {_label(self.reader, name)} ({path}) holds {count} NaN or "
                "infinite values; pass allow_nonfinite=True to load it all the same"
            )
        rows = self._row_order(path)
        if rows is not None:
            tensor = tensor[rows]
        if self.fmt == "gguf" and self.config.norm_offset and path.endswith("/scale"):
            # GGUF files have the sum of the two. What was added in float32 is taken away exactly.
            tensor = tensor - np.float32(self.config.norm_offset)
        transposed = self.fmt != "lutjax" and is_transposed(path)
        return tensor.swapaxes(-1, -2) if transposed else tensor

    def grid_spec(self, path: str) -> GridSpec | None:
        """What the headers say of a parameter that `read_grid` reads; None for any other."""
        return self.reader.grid_spec(self.name(path))

    def read_grid(self, path: str) -> GridBlocks:
        """Reads a quantised matrix as codes, a table, scales and offsets: bit for bit `read`.

        The rows are in the decoder's order; the orientation stays `[out, in]`.

        Raises:
          ValueError: if the parameter is stored in another way, or has scales or offsets that are
            not finite.
        """
        name = self.name(path)
        if self.grid_spec(path) is None:
            raise ValueError(
                f"{self.source}: tensor {name!r} ({path}) of type {self.reader.infos[name].dtype} "
                "is not stored as codes with scales"
            )
        grid = self.reader.read_grid(name)
        for values in jax.tree.leaves((grid.levels, grid.scales, grid.offsets)):
            if not self.allow_nonfinite and not np.isfinite(values).all():
                raise ValueError(
                    f"{self.source}: tensor {_label(self.reader, name)} ({path}) has a scale, an "
                    "offset or a table that is not finite; pass allow_nonfinite=True to load it "
                    "all the same"
                )
        rows = self._row_order(path)
        return grid if rows is None else grid.rows(rows)

    def parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """Reads all parameters, one at a time."""
        for path in self.shapes:
            yield path, self.read(path)

    def _row_order(self, path: str) -> np.ndarray | None:
        """Undoes llama.cpp's order of q and k rows, pairs (2i, 2i+1) instead of (i, i + h/2)."""
        if self.fmt != "gguf" or self.config.model_type not in ("llama", "mistral", "mixtral"):
            return None
        if "/q_proj/" in path:
            heads = self.config.num_heads
        elif "/k_proj/" in path:
            heads = self.config.num_kv_heads
        else:
            return None
        order = np.arange(heads * self.config.head_dim)
        return order.reshape(heads, self.config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def open_gguf(path: str | Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Opens a GGUF file; only its header (and RoPE factors) are read.

    Args:
      path: the file.
      allow_nonfinite: whether a parameter may have NaN and Inf; reading it is an error otherwise.

    Returns:
      The checkpoint; `checkpoint.reader.metadata` has the tokenizer.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not sound or a part of a split one, or the architecture is not
        supported.
    """
    path = Path(path)
    reader = GGUFReader(path)
    if (parts := reader.metadata.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts of a model; merge them: llama-gguf-split --merge "
            "first-part.gguf merged.gguf"
        )
    embedding = reader.infos.get(checkpoint_name("embed_tokens/embedding", "gguf"))
    if embedding is None:
        raise ValueError(f"{path} has no tensor 'token_embd.weight'; it is not a language model")
    factors = reader.read("rope_freqs.weight") if "rope_freqs.weight" in reader.infos else None
    config = config_from_gguf(
        reader.metadata,
        tied=checkpoint_name("lm_head/kernel", "gguf") not in reader.infos,
        vocab_size=embedding.shape[0],
        rope_factors=factors,
        source=str(path),
    )
    return Checkpoint.create(path, config, "gguf", reader, allow_nonfinite=allow_nonfinite)


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the unrolled decoder, by path.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=2)
    >>> parameter_shapes(config)["layers/1/mlp/up_proj/kernel"]
    (4, 6)
    """
    # Traced with scanned layers, so that the time does not grow with their number.
    tree = abstract_params(dataclasses.replace(config, scan_layers=True))
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: dict[str, tuple[int, ...]] = {}
    for path, leaf in named_leaves(tree):
        if path.startswith("layers/"):
            stacked[path.removeprefix("layers/")] = leaf.shape[1:]
        else:
            shapes[path] = leaf.shape
    for i in range(config.num_layers):
        shapes |= {f"layers/{i}/{path}": shape for path, shape in stacked.items()}
    return shapes


def nest(
    flat: Mapping[str, Any], keys: Mapping[str, Sequence[str | int]] | None = None
) -> dict[Any, Any]:
    """Turns `{"a/b": leaf}` into `{"a": {"b": leaf}}`.

    Args:
      flat: Leaves by path.
      keys: The keys of those whose path does not say them.

    >>> nest({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    >>> nest({"a/0": 1}, keys={"a/0": ("a", 0)})
    {'a': {0: 1}}
    """
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        *parents, last = (keys or {}).get(path, path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _stored_name(
    path: str, config: DecoderConfig, fmt: CheckpointFormat, reader: TensorReader
) -> str:
    name = checkpoint_name(path, fmt, post_norms=config.post_norms)
    if config.model_type == "gpt_oss":
        name = gpt_oss.checkpoint_name(name)
    if path == "embed_tokens/embedding" and fmt == "hf" and config.tie_embeddings:
        # Of two tensors that are one, some tools keep the output head.
        head = checkpoint_name("lm_head/kernel", fmt)
        return head if name not in reader.infos and head in reader.infos else name
    return name


def _label(reader: TensorReader, name: str) -> str:
    """What to call a tensor in errors: as the decoder knows it, and as it is stored."""
    stored = reader.stored_name(name)
    return repr(name) if stored == name else f"{name!r} (stored in {stored!r})"


def _check_tensor(
    source: Path,
    reader: TensorReader,
    name: str,
    shape: tuple[int, ...],
    transposed: bool,
    fmt: CheckpointFormat,
) -> None:
    if name not in reader.infos:
        near = difflib.get_close_matches(name, reader.infos, n=1)
        hint = f"; the nearest name is {near[0]!r}" if near else ""
        raise ValueError(f"{source}: tensor {name!r} is missing{hint}")
    info = reader.infos[name]
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    if info.shape != stored:
        raise ValueError(
            f"{source}: tensor {_label(reader, name)} has shape {list(info.shape)}; the "
            f"configuration needs {list(stored)}"
        )
    quantized = reader.grid_spec(name) is not None
    if fmt != "gguf" and not quantized and info.dtype not in FLOAT_TYPES:
        raise ValueError(
            f"{source}: tensor {_label(reader, name)} has dtype {info.dtype}; a dense weight must "
            f"be one of {', '.join(FLOAT_TYPES)}"
        )
