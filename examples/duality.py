"""Two views of one object: a projected optimiser and the adapter that it is the dual of.

    python examples/duality.py --output docs/figures/duality.png

Cells in the style of a notebook (`# %%`); each runs in seconds.
"""

# %% A small regression with two layers, and a map S for both weights.
from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from lutjax.adapters import dual
from lutjax.linear_maps import SVD
from lutjax.optim import project

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
STEPS, SWITCH, REFRESH = 120, 50, 40


def problem() -> tuple[dict, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(16, 32)) / 4, "down": rng.normal(size=(32, 8)) / 6}
    x = jnp.asarray(rng.normal(size=(64, 16)))
    return jax.tree.map(jnp.asarray, params), x, jnp.sin(x[:, :8] * 2)


def loss_fn(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


# %% One object: any optimiser in the space of S. Its dual trains lambda in W_0 + S^T lambda.
optimizer = project(optax.adam(1e-2), SVD(rank=4), refresh_every=REFRESH)
training = dual(optimizer)


# %% View one: gradients are projected, updates are projected back.
@jax.jit
def weight_step(params, state, x, y):
    gradients = jax.grad(loss_fn)(params, x, y)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


# %% View two: the weights are frozen, an adapter is trained, and merged when S changes.
@jax.jit
def adapter_step(state, x, y):
    def refresh(state):
        return training.refresh(state, jax.grad(loss_fn)(training.weights(state), x, y))

    state = jax.lax.cond(training.is_due(state), refresh, lambda state: state, state)
    gradients = jax.grad(lambda r: loss_fn(training.weights(state, r), x, y))(state.latents)
    return training.update(gradients, state)


# %% Three runs: either view, and one that changes from the first to the second on its way.
def run() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    start, x, y = problem()
    paths: dict[str, list] = {"weights": [], "adapters": [], "switched": []}
    params, state = start, optimizer.init(start)
    adapter = training.init(start)
    switched = None
    for step in range(STEPS):
        if step == SWITCH:
            switched = training.from_projected(params, state)
        params, state = weight_step(params, state, x, y)
        adapter = adapter_step(adapter, x, y)
        paths["weights"].append(params)
        paths["adapters"].append(training.weights(adapter))
        if switched is not None:
            switched = adapter_step(switched, x, y)
            paths["switched"].append(training.weights(switched))
    flat = {
        name: np.array([np.concatenate([np.ravel(v) for v in p.values()]) for p in path])
        for name, path in paths.items()
    }
    losses = np.array([float(loss_fn(p, x, y)) for p in paths["weights"]])
    return losses, flat


# %% The trajectories lie on each other.
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("duality.png"))
    output = parser.parse_args().output
    losses, paths = run()
    reference = paths["weights"]
    gaps = {
        "adapters": np.abs(paths["adapters"] - reference).max(1),
        "switched": np.abs(paths["switched"] - reference[SWITCH:]).max(1),
    }
    for name, gap in gaps.items():
        print(f"largest difference of a weight, {name}: {gap.max():.1e} after {STEPS} steps")

    # The two directions in which the trajectory moves most.
    centred = reference - reference.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    styles = {"weights": ("-", 5, 0.3), "adapters": ("--", 1.5, 1.0), "switched": (":", 2.5, 1.0)}
    labels = {
        "weights": "project(adam, S) on the weights",
        "adapters": "adam on the dual adapter",
        "switched": f"changed from one to the other at step {SWITCH}",
    }
    for name, path in paths.items():
        line, width, alpha = styles[name]
        points = (path - reference.mean(0)) @ directions.T
        left.plot(*points.T, line, linewidth=width, alpha=alpha, label=labels[name])
    left.set(xlabel="first principal direction", ylabel="second", title="trajectories")
    left.legend()
    right.semilogy(losses, label="loss")
    right.semilogy(np.maximum(gaps["adapters"], 1e-17), label="largest difference of a weight")
    for step in range(REFRESH, STEPS, REFRESH):
        right.axvline(step, color="gray", linewidth=0.5)
    right.set(xlabel="step (lines: S changes)")
    right.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
