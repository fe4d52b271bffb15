"""Optimiser-state bytes of Llama configurations, by shapes alone: ``python -m train.memory``."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lutjax.linear_maps import matching
from lutjax.models import DecoderConfig, abstract_params
from lutjax.optim import galore, quantized_state
from train.llama_configs import GALORE_RANKS, LLAMA
from train.methods import PROJECTED


def param_shapes(config: DecoderConfig, dtype: Any = jnp.bfloat16) -> Any:
    """The parameters' shapes, layers stacked; nothing is allocated."""
    shapes = abstract_params(dataclasses.replace(config, scan_layers=True))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def state_bytes(optimizer: optax.GradientTransformation, params: Any) -> int:
    """Bytes of an optimiser's state for parameters of these shapes."""
    state = jax.eval_shape(optimizer.init, params)
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))


def galore_numbers(m: int, n: int, rank: int) -> int:
    """Numbers that GaLore keeps for an `m x n` weight: `m r + 2 n r` for `m <= n`.

    Source: GaLore (arXiv 2403.03507, table 1).

    >>> galore_numbers(4096, 11008, 1024), 2 * 4096 * 11008
    (26738688, 90177536)
    """
    m, n = min(m, n), max(m, n)
    return m * rank + 2 * n * rank


def memory_table(names: tuple[str, ...] = tuple(GALORE_RANKS)) -> list[dict[str, Any]]:
    """State bytes of Adam, GaLore and 8-bit GaLore in bfloat16 for each configuration."""
    rows = []
    for name in names:
        params = param_shapes(LLAMA[name])
        projected = galore(
            1e-3, rank=GALORE_RANKS[name], weight_dimension_numbers=matching(*PROJECTED)
        )
        full = state_bytes(optax.adam(1e-3), params)
        low = state_bytes(projected, params)
        low_8bit = state_bytes(quantized_state(projected), params)
        rows.append(
            {
                "config": name,
                "rank": GALORE_RANKS[name],
                "params": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
                "adam": full,
                "galore": low,
                "galore_8bit": low_8bit,
            }
        )
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "| Llama | rank | Adam, GB | GaLore, GB | 8-bit GaLore, GB | saved | saved, 8-bit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        sizes = " | ".join(f"{r[k] / 1e9:.3f}" for k in ("adam", "galore", "galore_8bit"))
        saved = " | ".join(f"{1 - r[k] / r['adam']:.1%}" for k in ("galore", "galore_8bit"))
        lines.append(f"| {r['config']} | {r['rank']} | {sizes} | {saved} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m train.memory", description=__doc__).parse_args()
    print(format_table(memory_table()))
