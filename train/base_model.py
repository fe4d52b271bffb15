"""The frozen base of a finetuning run and the adapter it starts with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lutjax
from lutjax.adapters import lora
from lutjax.arrays import LowRankArray, has_compressed, is_compressed, shardings_like
from lutjax.io import Tokenizer, load_peft, load_peft_head, require_tokenizer
from lutjax.io.peft import TENSORS_NAME
from lutjax.io.safetensors import SafetensorsReader
from lutjax.models import Decoder
from lutjax.transforms.decompose import decompose

Method = Literal["lora", "qlora", "lq-lora", "loftq"]

METHODS: dict[str, str] = {
    "lora": "the base as it is, whether dense or quantised; the adapter starts at zero",
    "qlora": "the base quantised; the adapter starts at zero",
    "lq-lora": "quantised plus low-rank by LQ-LoRA; the low-rank part is trained",
    "loftq": "the same by LoftQ",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      model: The decoder.
      tokenizer: Its tokenizer.
      base: Frozen parameters.
      adapter: What is trained, by path, in float32.
    """

    model: Decoder
    tokenizer: Tokenizer
    base: Any
    adapter: dict[str, LowRankArray]


def load_start(path: str | Path, dtype: Any, *, remat: bool = False) -> Start:
    """Loads a model; low-rank parts that it has already are the adapter.

    Raises:
      ValueError: If the model has no tokenizer.
    """
    model, params, tokenizer = lutjax.load(path, dtype)
    tokenizer = require_tokenizer(tokenizer, path)
    base, adapter = lora.detach(params)
    model = Decoder(dataclasses.replace(model.config, dtype=jnp.dtype(dtype), remat=remat))
    return Start(model, tokenizer, base, _float32(adapter))


def prepare(
    start: Start,
    method: Method,
    *,
    rank: int,
    recipe: lutjax.Recipe,
    targets: tuple[str, ...],
    key: jax.Array,
    rounds: int | None = None,
    peft: str | None = None,
) -> Start:
    """Compresses the base and makes the adapter, as the method says.

    A model that has low-rank parts already (`lutjax decompose` made it, or an earlier run) goes on
    with those.

    Args:
      start: The loaded model.
      method: One of `METHODS`.
      rank: Inner size of the adapter.
      recipe: How the base is quantised, such as an allocation plan.
      targets: Globs of the matrices that get an adapter, for ``lora`` and ``qlora``; the others
        give one to every matrix that the recipe quantises.
      key: For random factors.
      rounds: Of the decomposition, see :func:`lutjax.decompose`.
      peft: Directory of a PEFT adapter to go on with, for ``lora`` and ``qlora``.

    Raises:
      ValueError: If the method does not fit the model or the options.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}")
    if start.adapter or method == "lora":
        if method != "lora":
            raise ValueError(f"method={method!r} needs a dense model; this one has low-rank parts")
        base = start.base
    elif has_compressed(start.base):
        raise ValueError(f"method={method!r} needs a dense model; use 'lora' on a compressed one")
    elif method == "qlora":
        base = lutjax.quantize(start.base, recipe)
    else:
        if peft is not None:
            raise ValueError(f"method={method!r} makes its own adapter; leave out the PEFT one")
        name: Any = {"lq-lora": "lq", "loftq": "loftq"}[method]
        params = decompose(
            start.base, recipe, rank=rank, method=name, rounds=rounds, key=key, progress=True
        )
        base, adapter = lora.detach(params)
        return dataclasses.replace(start, base=base, adapter=_float32(adapter))
    adapter = start.adapter
    if peft is not None:
        if adapter:
            raise ValueError("the model has low-rank parts and a PEFT adapter is given; merge one")
        adapter = load_peft(peft, dtype=jnp.float32)
        lora.attach(base, adapter)  # refuses one that does not fit
    adapter = adapter or lora.init(base, rank, key, targets=targets)
    return dataclasses.replace(start, base=base, adapter=adapter)


def load_head(peft: str | Path) -> jax.Array | None:
    """The head of a classifier in a PEFT adapter, `float32[D, C]`; None if it has none."""
    names = SafetensorsReader.open_file(Path(peft) / TENSORS_NAME).infos
    if not any(name.endswith("score.weight") for name in names):
        return None
    return load_peft_head(peft).astype(jnp.float32)


def shard_base(base: Any, mesh: Mesh) -> Any:
    """Puts the base on a mesh: matrices by their last axis over the mesh axis ``model``.

    What does not split evenly is replicated.
    """
    shards = mesh.shape["model"]

    def place(leaf: Any) -> NamedSharding:
        if len(leaf.shape) < 2 or leaf.shape[-1] % shards:
            return NamedSharding(mesh, PartitionSpec())
        entries = [None] * (len(leaf.shape) - 1)
        return NamedSharding(mesh, PartitionSpec(*entries, "model"))

    dense = jax.tree.map(place, base, is_leaf=is_compressed)
    return jax.device_put(base, shardings_like(base, dense))


def _float32(adapter: dict[str, LowRankArray]) -> dict[str, LowRankArray]:
    return {
        path: dataclasses.replace(
            part, left=part.left.astype(jnp.float32), right=part.right.astype(jnp.float32)
        ).astype(jnp.float32)
        for path, part in adapter.items()
    }
