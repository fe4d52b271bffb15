"""Parameters to parameters with fewer and larger matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lutjax.arrays import side_by_side


def fuse_projections(params: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the matrices of a :class:`lutjax.models.Decoder` that multiply the same activations.

    Seven products a block become four, which is faster where few rows are multiplied: the query,
    key and value projections are one matrix ``qkv_proj``, and the first two of an MLP, or of its
    experts, are ``gate_up_proj``. The decoder runs either form. Weights that are stored alike are
    joined to one (:func:`lutjax.arrays.side_by_side`); the others are multiplied one by one, as
    before. It is for inference on one device, before :func:`lutjax.prepack`: adapters, sparsity
    plans and other libraries' checkpoints go by the names of the projections themselves.

    Args:
      params: Parameters of a decoder, dense or compressed, unrolled or stacked, outside
        ``jax.jit``.

    Returns:
      The tree with ``.../qkv_proj`` and ``.../gate_up_proj``; other leaves are the same, as are
      projections that are joined already.

    Raises:
      ValueError: If there is nothing to join, or projections do not fit (with their path).

    >>> import jax, lutjax
    >>> import jax.numpy as jnp
    >>> from lutjax.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=32)
    >>> params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> fused = lutjax.fuse_projections(lutjax.quantize(params, bits=4))
    >>> fused["layers"]["0"]["self_attn"]["qkv_proj"]["kernel"]
    LutArray(shape=(64, 128), float32, 4 bits, group_size=column, 4.4 kB)
    """
    from lutjax.models.projections import FUSED  # models import flax

    fused, joined = _fuse(params, FUSED, "")
    if not joined:
        wanted = " or ".join(", ".join(names) for names in FUSED.values())
        raise ValueError(f"nothing to join: the parameters have no {wanted} side by side")
    return fused


def _fuse(
    tree: Mapping[str, Any], groups: Mapping[str, tuple[str, ...]], path: str
) -> tuple[dict[str, Any], bool]:
    """The tree with joined projections, and whether there were any."""
    new, joined = {}, False
    for key, child in tree.items():
        new[key] = child
        if isinstance(child, Mapping):
            new[key], found = _fuse(child, groups, f"{path}{key}/")
            joined |= found
    for name, parts in groups.items():
        joined |= name in new
        if all(isinstance(new.get(part), Mapping) for part in parts):
            new[name] = _join([new.pop(part) for part in parts], path + ", ".join(parts))
            joined = True
    return new, joined


def _join(projections: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """One layer with the kernel, and perhaps the bias, of all."""
    names = projections[0].keys()
    if any(projection.keys() != names for projection in projections):
        have = [sorted(projection) for projection in projections]
        raise ValueError(f"{path}: they differ in what they have, {have}")
    try:
        return {
            name: side_by_side(*(projection[name] for projection in projections)) for name in names
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
