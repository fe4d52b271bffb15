"""Computes the tables of `lutjax.codebooks.gaussian`: the best few points for normal numbers.

    python benchmarks/gaussian_grids.py [--starts 16] [--output lutjax/gaussian_grids.json]

Points in one and two dimensions that minimise the mean squared distance of a standard normal vector
to the nearest of them: Lloyd's algorithm with integrals over a fine lattice, from several random
starts on a coarse one. Takes half an hour; a file that exists is only replaced where it is beaten.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from tqdm import tqdm

COARSE, FINE, RADIUS = 0.04, 0.01, 6.0


def lattice(step: float, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of a lattice and the normal density at each of them, normalised."""
    axis = np.arange(-RADIUS, RADIUS, step) + step / 2
    points = np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), axis=-1)
    points = points.reshape(-1, dimensions)
    points = points[(points**2).sum(axis=1) < RADIUS**2]
    weights = np.exp(-0.5 * (points**2).sum(axis=1))
    return points, weights / weights.sum()


def lloyd(
    grid: np.ndarray, points: np.ndarray, weights: np.ndarray, rounds: int, tolerance: float
) -> tuple[np.ndarray, float]:
    """Moves every point to the mean of its cell, until nothing moves far; the error a coordinate.

    Steps are lengthened, because the plain algorithm crawls; one that raises the error is undone.
    """
    best, best_error, stretch = grid, np.inf, 1.0
    for _ in range(rounds):
        distance, cell = cKDTree(grid).query(points)
        error = float((weights * distance**2).sum() / points.shape[1])
        if error < best_error:
            best, best_error, stretch = grid, error, min(1.9, stretch * 1.05)
        elif stretch > 1:
            grid, stretch = best, 1.0
            continue
        mass = np.bincount(cell, weights, len(grid))
        sums = [np.bincount(cell, weights * p, len(grid)) for p in points.T]
        means = np.where(mass > 0, np.stack(sums) / np.where(mass > 0, mass, 1), grid.T).T
        moved = np.abs(means - grid).max()
        grid = grid + stretch * (means - grid)
        if moved < tolerance:
            break
    return best, best_error


def optimise(bits: int, dimensions: int, starts: int) -> tuple[np.ndarray, float]:
    """The best of several starts."""
    rng = np.random.default_rng(bits)
    coarse, fine = lattice(COARSE, dimensions), lattice(FINE, dimensions)
    found = []
    for _ in tqdm(range(starts), desc=f"{bits} bits, {dimensions} dimensions"):
        start = 1.3 * rng.standard_normal((2**bits, dimensions))
        found.append(lloyd(start, *coarse, rounds=1500, tolerance=1e-4))
    best, _ = min(found, key=lambda result: result[1])
    return lloyd(best, *fine, rounds=150, tolerance=1e-5)


def lloyd_max(bits: int) -> tuple[np.ndarray, float]:
    """The best points on the line, by exact integrals of the density."""
    from scipy.special import ndtr, ndtri

    def density(x: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)

    count = 2**bits
    grid = np.sqrt(3) * ndtri((np.arange(count) + 0.5) / count)  # Bennett's optimal point density
    for _ in range(300_000):
        edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
        mass = np.diff(ndtr(edges))
        means = -np.diff(density(edges)) / mass
        moved = np.abs(means - grid).max()
        grid = (means - means[::-1]) / 2  # symmetric
        if moved < 1e-13:
            break
    return grid[:, None], float(1 - (mass * grid**2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("lutjax/gaussian_grids.json"))
    arguments = parser.parse_args()
    tables = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for dimensions, widths in ((1, range(1, 9)), (2, range(2, 9))):
        for bits in widths:
            name = f"{bits} bits, {dimensions} dimensions"
            grid, error = (
                lloyd_max(bits) if dimensions == 1 else optimise(bits, dimensions, arguments.starts)
            )
            print(f"{name}: mean squared error {error:.6f} a coordinate", flush=True)
            if error < tables.get(name, {"error": np.inf})["error"] - 1e-9:
                order = np.lexsort(grid.T[::-1])
                tables[name] = {"error": round(error, 9), "points": grid[order].round(7).tolist()}
                lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in tables.items()]
                arguments.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
