"""The project's own checkpoints: a directory with safetensors and a description of each parameter.

config.json         the decoder, in Hugging Face's terms
lutjax.json         format version, and each parameter's class and static fields
model.safetensors   the arrays, called `path` or `path.field` (or shards with an index)
tokenizer.json …    as in any Hugging Face directory
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lutjax.arrays import CompressedArray, format_bytes, is_compressed
from lutjax.io.array_schema import describe, restore
from lutjax.io.checkpoint import nest, parameter_shapes
from lutjax.io.configs import config_from_hf, config_to_hf
from lutjax.io.new_directory import check_destination, new_directory
from lutjax.io.safetensors import SafetensorsReader, read_json
from lutjax.io.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter, tensor_bytes
from lutjax.io.tokenizer import Tokenizer
from lutjax.models.config import DecoderConfig
from lutjax.models.decoder import abstract_params
from lutjax.models.projections import FUSED
from lutjax.paths import named_leaves
from lutjax.progress import progress_bar

METADATA_NAME = "lutjax.json"
_FORMAT, _VERSION = "lutjax", 1


@dataclasses.dataclass(frozen=True)
class CompressedCheckpoint:
    """A checkpoint in the project's own format whose headers are sound; values are read on demand.

    Attributes:
      source: the directory.
      config: the decoder's configuration, or None if it was saved without one.
      reader: the tensors.
      descriptions: of each parameter, by path; see `lutjax.io.array_schema`.
      allow_nonfinite: whether `read` gives NaN and Inf as they are.
      keys: those of dictionaries, of each parameter whose path does not say them: numbers, as Flax
        NNX has for the layers of a list, and names with a slash.
    """

    source: Path
    config: DecoderConfig | None
    reader: SafetensorsReader
    descriptions: Mapping[str, Any]
    allow_nonfinite: bool = False
    keys: Mapping[str, Sequence[str | int]] = dataclasses.field(default_factory=dict)

    def abstract(self, path: str) -> Any:
        """One parameter with `jax.ShapeDtypeStruct` for arrays, from the headers alone."""

        def spec(name: str) -> jax.ShapeDtypeStruct:
            info = self.reader.infos[name]
            return jax.ShapeDtypeStruct(info.shape, self.reader.dtype(name))

        return restore(self.descriptions[path], spec)

    def read(self, path: str) -> Any:
        """Reads one parameter, dense or compressed.

        Raises:
          ValueError: if it holds NaN or Inf and `allow_nonfinite` is not set.
        """

        def tensor(name: str) -> jax.Array:
            values = self.reader.read(name)
            floating = jnp.issubdtype(values.dtype, jnp.floating)
            if not self.allow_nonfinite and floating and not np.isfinite(values).all():
                raise ValueError(
                    f"{self.source}: tensor {name!r} holds NaN or infinite values; pass "
                    "allow_nonfinite=True to load it all the same"
                )
            return jax.device_put(values)

        return restore(self.descriptions[path], tensor)

    def parameters(self) -> Iterator[tuple[str, Any]]:
        """Reads all parameters, one at a time."""
        for path in self.descriptions:
            yield path, self.read(path)


def save(
    path: str | Path,
    params: Mapping[str, Any],
    config: DecoderConfig | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Saves dense and compressed parameters; `lutjax.load` gives back the same bits.

    The directory is written under a temporary name beside its place and renamed when it is
    complete.

    Args:
      path: the directory to make; nothing may be there.
      params: nested dictionaries of arrays and compressed arrays.
      config: the decoder that they belong to; without it, `read_params` reads them back.
      tokenizer: is saved along.
      max_shard_bytes: the size from which the arrays are spread over several files.

    Raises:
      FileExistsError: if something is at `path`.
      TypeError: if `params` holds something else than arrays, or a dtype that cannot be stored.
      ValueError: if `params` does not fit `config`, two parameters have one path, or a dictionary
        is empty.
      OSError: if the disk is full; nothing is left behind.

    >>> import tempfile, lutjax
    >>> params = lutjax.quantize({"kernel": jnp.eye(32)}, bits=4, group_size=32)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory + "/eye", params)
    ...     read_params(directory + "/eye")["kernel"]
    LutArray(shape=(32, 32), float32, 4 bits, group_size=column, 640 B)
    """
    leaves, keys = _flat_leaves(params)
    specs = {name: _abstract(leaf, name) for name, leaf in leaves.items()}
    write_checkpoint(
        path,
        specs,
        leaves.__getitem__,
        keys=keys,
        config=config,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def write_checkpoint(
    destination: str | Path,
    specs: Mapping[str, Any],
    leaf: Callable[[str], Any],
    *,
    keys: Mapping[str, Sequence[str | int]] | None = None,
    config: DecoderConfig | None,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: str | None = None,
) -> None:
    """Writes a checkpoint of which one parameter at a time is in memory.

    Args:
      destination: the directory to make.
      specs: each parameter by path, with `jax.ShapeDtypeStruct` for arrays.
      leaf: makes the parameter of a path when its turn comes.
      keys: the keys of parameters whose path does not say them.
      config: the decoder's configuration, if it is one.
      tokenizer: is saved along.
      max_shard_bytes: the size from which the arrays are spread over several files.
      progress: what a progress bar says that happens to the parameters; None for no bar.

    Raises:
      FileExistsError: if something is at the destination.
      ValueError: if the parameters do not fit the configuration.
      OSError: if the disk is full.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    destination = check_destination(destination)
    decoder = None if config is None else _decoder_fields(config)
    if config is not None:
        _check_decoder(specs, config, str(destination))
    descriptions: dict[str, Any] = {}
    tensors: dict[str, jax.ShapeDtypeStruct] = {}
    for path, spec in specs.items():
        descriptions[path], found = describe(spec, path)
        tensors |= found
    _check_space(destination, sum(map(tensor_bytes, tensors.values())))
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "decoder": decoder,
        "parameters": descriptions,
    }
    if keys:
        metadata["keys"] = keys
    with new_directory(destination) as directory:
        with SafetensorsWriter(directory, tensors, max_shard_bytes) as writer:
            bar = progress_bar(specs, progress or "", "tensor", show=progress is not None)
            for path in bar:
                for name, array in describe(leaf(path), path)[1].items():
                    writer.write(name, np.asarray(array))
        if config is not None:
            # Whoever does not know this format is told that the weights are not plain ones.
            marked = config_to_hf(config) | {"quantization_config": {"quant_method": _FORMAT}}
            _write_json(directory / "config.json", marked)
        if tokenizer is not None:
            tokenizer.save(directory)
        _write_json(directory / METADATA_NAME, metadata)


def is_compressed_directory(directory: str | Path) -> bool:
    """Whether a directory is a checkpoint in the project's own format."""
    return (Path(directory) / METADATA_NAME).is_file()


def open_compressed(
    directory: str | Path, *, allow_nonfinite: bool = False
) -> CompressedCheckpoint:
    """Opens a directory that `save` wrote; only headers are read.

    Args:
      directory: its path.
      allow_nonfinite: whether a parameter may have NaN and Inf; reading it is an error otherwise.

    Returns:
      The checkpoint.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is not sound, was written by a newer version, or the arrays do not fit
        each other or the configuration.
    """
    directory = Path(directory)
    source = directory / METADATA_NAME
    metadata = read_json(source)
    version, parameters = metadata.get("version"), metadata.get("parameters")
    if metadata.get("format") != _FORMAT or not isinstance(parameters, dict):
        raise ValueError(f"{source} does not describe a lutjax checkpoint")
    if version != _VERSION:
        raise ValueError(
            f"{source} has the format version {version!r}; this lutjax reads {_VERSION}: update it"
        )
    reader = SafetensorsReader.open_directory(directory)
    config = _read_config(directory, metadata)
    keys = _read_keys(source, metadata, parameters)
    checkpoint = CompressedCheckpoint(directory, config, reader, parameters, allow_nonfinite, keys)
    specs = {}
    sound: set[Any] = set()
    for path in parameters:
        try:
            specs[path] = checkpoint.abstract(path)
            _check_array(specs[path], sound)
        except KeyError as error:
            message = f"{directory}: {path!r} needs the tensor {error}, which is missing"
            raise ValueError(message) from error
        except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{directory}: the arrays of {path!r} do not fit: {error}") from error
    if config is not None:
        _check_decoder(specs, config, str(directory))
    return checkpoint


def _read_keys(source: Path, metadata: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
    keys = metadata.get("keys", {})
    sound = isinstance(keys, dict) and all(
        path in parameters
        and isinstance(own, list)
        and all(isinstance(key, str | int) for key in own)
        and "/".join(map(str, own)) == path
        for path, own in keys.items()
    )
    if not sound:
        raise ValueError(f"{source} has keys that are not those of its parameters")
    return keys


def read_params(directory: str | Path, *, allow_nonfinite: bool = False) -> dict[Any, Any]:
    """Reads the parameters that `save` wrote, of a decoder or of anything else.

    Args:
      directory: its path.
      allow_nonfinite: whether a parameter may have NaN and Inf; it is an error otherwise.

    Returns:
      Nested dictionaries of arrays and compressed arrays.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is not sound.
    """
    checkpoint = open_compressed(directory, allow_nonfinite=allow_nonfinite)
    return nest(dict(checkpoint.parameters()), checkpoint.keys)


def _flat_leaves(params: Any) -> tuple[dict[str, Any], dict[str, tuple[str | int, ...]]]:
    """Leaves by path; and the keys of those whose path cannot be split into them again."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {type(params).__name__}; it must be nested dictionaries")
    leaves: dict[str, Any] = {}
    odd: dict[str, tuple[str | int, ...]] = {}

    def collect(tree: Mapping[Any, Any], parents: tuple[str | int, ...]) -> None:
        for key, child in tree.items():
            keys = (*parents, key)
            path = "/".join(map(str, keys))
            if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
                raise ValueError(
                    f"the key {key!r} of {path!r} cannot be saved; use names or numbers"
                )
            if isinstance(child, Mapping):
                if not child:
                    raise ValueError(
                        f"{path!r} is an empty dictionary, which cannot be saved; remove it"
                    )
                collect(child, keys)
                continue
            if path in leaves:
                raise ValueError(f"there are two parameters called {path!r}; rename one")
            leaves[path] = child
            if keys != tuple(path.split("/")):
                odd[path] = keys

    collect(params, ())
    return leaves, odd


def _abstract(leaf: Any, name: str) -> Any:
    def spec(array: Any) -> jax.ShapeDtypeStruct:
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(
                f"{name!r} holds a {type(array).__name__}; only nested dictionaries of arrays can "
                f"be saved (of Flax NNX: nnx.to_pure_dict(state))"
            )
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(f"{name!r} holds {array.dtype}; save jax.random.key_data of it")
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    if not is_compressed(leaf):
        return spec(leaf)
    return jax.tree.map(spec, leaf)


def _decoder_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields that config.json has no place for."""
    fields = {
        "dtype": jnp.dtype(config.dtype).name,
        "scan_layers": config.scan_layers,
        "remat": config.remat,
    }
    if _with_fields(config_from_hf(config_to_hf(config)), fields) != _normal(config):
        raise ValueError(f"config.json cannot express {config}")
    return fields


def _with_fields(config: DecoderConfig, fields: Mapping[str, Any]) -> DecoderConfig:
    return _normal(dataclasses.replace(config, **fields))


def _normal(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, dtype=jnp.dtype(config.dtype))


def _read_config(directory: Path, metadata: Mapping[str, Any]) -> DecoderConfig | None:
    fields = metadata.get("decoder")
    if fields is None:
        return None
    path = directory / "config.json"
    data = read_json(path)
    data.pop("quantization_config", None)
    try:
        return _with_fields(config_from_hf(data, str(path)), fields)
    except TypeError as error:
        raise ValueError(f"{directory / METADATA_NAME}: 'decoder' is {fields!r}") from error


def _check_decoder(specs: Mapping[str, Any], config: DecoderConfig, source: str) -> None:
    if config.scan_layers:
        shapes = {path: leaf.shape for path, leaf in named_leaves(abstract_params(config))}
    else:
        shapes = parameter_shapes(config)
    for path in specs:
        if any(name in FUSED for name in path.split("/")):
            raise ValueError(
                f"{source}: {path!r} is several projections in one; save the parameters as they "
                "are before lutjax.fuse_projections"
            )
    for path in [*shapes, *specs]:
        if path not in specs:
            raise ValueError(f"{source}: the parameter {path!r} is missing")
        if path not in shapes:
            raise ValueError(f"{source}: the decoder has no parameter {path!r}")
        if specs[path].shape != shapes[path]:
            raise ValueError(
                f"{source}: {path!r} has shape {specs[path].shape}; the configuration needs "
                f"{shapes[path]}"
            )


def _check_array(leaf: Any, sound: set[Any]) -> None:
    """Traces the uses of a compressed array, so that arrays that do not fit are refused.

    Args:
      leaf: with `jax.ShapeDtypeStruct` for arrays.
      sound: the kinds that passed; many parameters are of the same kind.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return
    if not isinstance(leaf, CompressedArray):
        raise TypeError(f"it is a {type(leaf).__name__}")
    arrays, structure = jax.tree.flatten(leaf)
    kind = (structure, tuple((a.shape, a.dtype) for a in arrays))
    if kind in sound:
        return
    rows, columns = leaf.matrix_shape
    dense = jax.eval_shape(lambda w: w.materialize(), leaf)
    x = jax.ShapeDtypeStruct((*leaf.batch_shape, 1, rows), jnp.float32)
    product = jax.eval_shape(lambda w, x: w.matmul(x), leaf, x)
    if dense.shape != leaf.shape or product.shape != (*leaf.batch_shape, 1, columns):
        raise ValueError(f"{leaf!r} gives a weight of shape {dense.shape}")
    sound.add(kind)


def _check_space(destination: Path, needed: int) -> None:
    parent = destination.absolute().parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        text = f"{format_bytes(needed)} are needed but {format_bytes(free)} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {text}", str(parent))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
