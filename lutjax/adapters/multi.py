"""Many adapters on one base: each sequence of a batch runs with its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lutjax.adapters import lora
from lutjax.arrays import LowRankArray
from lutjax.models import KVCache, LayerCache


def batch(adapters: Sequence[Mapping[str, LowRankArray]]) -> dict[str, LowRankArray]:
    """Adapters of one kind as one tree, whose arrays have a leading axis that counts them.

    For sequences in any order, take each one's: ``jax.tree.map(lambda a: a[index], batched)``.

    Args:
      adapters: Of the same paths, ranks and dtypes.

    Raises:
      ValueError: If there is none, or two differ; names what.

    >>> one = {"w": LowRankArray.of(jnp.ones((4, 1)), jnp.ones((1, 2)))}
    >>> batch([one, one, one])["w"].left.shape
    (3, 4, 1)
    """
    if not adapters:
        raise ValueError("adapters is empty; give at least one")
    first = dict(adapters[0])
    for number, other in enumerate(adapters[1:], 1):
        if first.keys() != other.keys():
            odd = sorted(first.keys() ^ other.keys())[:3]
            raise ValueError(f"adapters 0 and {number} are not of the same weights: {odd}")
        for path, part in other.items():
            if jax.tree.map(jnp.shape, part) != jax.tree.map(jnp.shape, first[path]):
                raise ValueError(
                    f"{path!r} is {first[path]} in adapter 0 and {part} in adapter {number}; "
                    "adapters of one batch need equal ranks and dtypes"
                )
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(dict, adapters))


def multi_lora(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder whose sequences each have their own adapter, for :func:`lutjax.models.generate`.

    The result takes ``(base, adapters)`` in the place of the parameters, where the arrays of
    ``adapters`` have a leading axis A (see :func:`batch`), and B = A * P sequences: the first P run
    with the first adapter, the next P with the second. The base is read once for all of them: its
    products see B rows, only those with the factors are batched.

    Args:
      apply_fn: A lifted ``Decoder.apply``.

    Returns:
      A function of ``{"params": (base, adapters)}``, ``tokens``, ``cache``, ``mask`` and
      ``logits_at``, as ``Decoder.apply`` has them.

    >>> import lutjax
    >>> from lutjax.models import Decoder, DecoderConfig, generate
    >>> config = DecoderConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=16)
    >>> model = Decoder(config)
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    >>> base = lutjax.quantize(params, bits=4, group_size=32)
    >>> adapters = [lora.init(base, rank=2, key=jax.random.key(i)) for i in range(2)]
    >>> apply = multi_lora(lutjax.lift(model.apply))
    >>> out = generate(apply, (base, batch(adapters)), [[1, 2], [3]], config=config,
    ...                max_new_tokens=3)
    >>> [len(tokens) for tokens in out]
    [3, 3]
    """

    def apply(
        variables: Any,
        tokens: jax.Array,
        *,
        cache: KVCache | None = None,
        mask: jax.Array | None = None,
        logits_at: jax.Array | None = None,
    ) -> Any:
        base, adapters = variables["params"]
        count = _count(adapters)
        if tokens.shape[0] % count:
            raise ValueError(
                f"{tokens.shape[0]} sequences cannot be shared among {count} adapters evenly"
            )
        split = functools.partial(_split, count=count)
        axes = _cache_axes(cache)

        def one(adapter: Any, tokens: Any, cache: Any, mask: Any, logits_at: Any) -> Any:
            return apply_fn(
                {"params": lora.attach(base, adapter)},
                tokens,
                cache=cache,
                mask=mask,
                logits_at=logits_at,
            )

        found = jax.vmap(
            one, in_axes=(0, 0, axes, 0, 0), out_axes=0 if cache is None else (0, axes)
        )(
            adapters,
            split(tokens),
            None if cache is None else _map_cache(split, cache),
            None if mask is None else split(mask),
            None if logits_at is None else split(logits_at),
        )
        if cache is None:
            return _join(found)
        logits, after = found
        return _join(logits), _map_cache(_join, after)

    return apply


def _count(adapters: Mapping[str, LowRankArray]) -> int:
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(adapters)}
    if len(counts) != 1:
        raise ValueError(f"adapters are not stacked: their leading axes are {sorted(counts)}")
    return counts.pop()


def _split(array: jax.Array, axis: int = 0, *, count: int) -> jax.Array:
    """``[B, ...]`` to ``[A, P, ...]``, or so from another axis on."""
    shape = array.shape
    return array.reshape(*shape[:axis], count, -1, *shape[axis + 1 :])


def _join(array: jax.Array, axis: int = 0) -> jax.Array:
    """The inverse of `_split`."""
    shape = array.shape
    return array.reshape(*shape[:axis], -1, *shape[axis + 2 :])


def _sequence_axis(layers: Any) -> int:
    """Layers that are scanned are stacked on the first axis."""
    return 1 if isinstance(layers, LayerCache) else 0


def _map_cache(fn: Callable[..., jax.Array], cache: KVCache) -> KVCache:
    axis = _sequence_axis(cache.layers)
    layers = jax.tree.map(lambda a: fn(a, axis), cache.layers)
    return KVCache(layers, fn(cache.positions, 0), cache.next_slot)


def _cache_axes(cache: KVCache | None) -> Any:
    if cache is None:
        return None
    axis = _sequence_axis(cache.layers)
    return KVCache(jax.tree.map(lambda _: axis, cache.layers), 0, None)  # type: ignore[arg-type]
