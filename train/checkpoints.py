"""Checkpoints of a run, with the configuration that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lutjax.paths import path_string


def differences(found: dict[str, Any], asked: dict[str, Any], where: str) -> str:
    """What differs between a configuration found somewhere and the one asked for; empty if equal.

    >>> differences({"rank": 4, "seed": 0}, {"rank": 3, "seed": 0}, "the checkpoint")
    'rank: 4 in the checkpoint, 3 asked for'
    """
    return "; ".join(
        f"{k}: {found.get(k)!r:.80} in {where}, {asked.get(k)!r:.80} asked for"
        for k in sorted(found.keys() | asked.keys())
        if k not in found or k not in asked or found[k] != asked[k]
    )


class Checkpoints:
    """Orbax checkpoints of a run's state, with the configuration that they belong to."""

    def __init__(self, directory: Path, identity: dict[str, Any], every: int) -> None:
        self._identity = identity
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=every, max_to_keep=2, enable_async_checkpointing=False
            ),
        )

    def restore(self, state: Any) -> tuple[Any, int]:
        """The latest state and its step; the given state and 0 when there is none.

        Raises:
          ValueError: When the checkpoint is of another configuration, naming what differs.
        """
        step = self._manager.latest_step()
        if step is None:
            return state, 0
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        found = dict(meta["meta"])
        differing = differences(found, self._identity, "the checkpoint")
        if differing:
            raise ValueError(
                f"cannot resume the checkpoint of step {step}: {differing}; "
                "use another output directory"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(state))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return _unflat(state, restored["state"]), step

    def save(self, step: int, state: Any, force: bool = False) -> None:
        """Saves if the step is due."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flat(state)),
                meta=ocp.args.JsonSave(self._identity),
            ),
            force=force,
        )

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _flat(state: Any) -> dict[str, Any]:
    """The arrays of a state by path: a form that doesn't depend on Python classes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_string(path).replace("/", "."): leaf for path, leaf in leaves}


def _unflat(like: Any, flat: dict[str, Any]) -> Any:
    leaves = [flat[name] for name in _flat(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
