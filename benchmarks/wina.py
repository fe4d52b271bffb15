"""What WINA's row norms and its change of basis do on SmolLM2-135M at 50 % sparsity.

    python benchmarks/wina.py

WINA (arXiv 2505.19427) compares |x| · ‖row‖ with a threshold. As published, the residual stream is
first rotated before attention into the left singular vectors of W_k (with the scale of the norm),
and before the MLP into those of W_gate, so that the rows of these two are orthogonal; norms weigh
the inputs of these two alone, and the first tokens stay dense. Two measurements, all with
thresholds that reach the target in the sparse model, block by block:

- each product by itself, on the inputs of the dense model: how much the norms of the rows vary, and
  the error of the product with weighted magnitudes, and in the published basis, over that with
  plain magnitudes (a token's error relative to its output, root mean square over tokens);
- perplexity of the model under five gates.

The rotation of the residual stream leaves the function as it is, so the gates are applied in the
rotated basis of each product's input. Writes wina.json and wina.md to benchmarks/results/sparsity.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sparsity import calibration_text
from tqdm import tqdm

import lutjax
from lutjax.arrays import CompressedArray, DenseArray, WrapperArray
from lutjax.calibrate.activations import row_norms
from lutjax.calibrate.observe import observe
from lutjax.cli.models import evaluation_text
from lutjax.dtypes import product
from lutjax.evaluate import windows
from lutjax.files import replace_file
from lutjax.io import demo_model_path
from lutjax.models.blockwise import decoder_blocks

PATHS = {n: f"self_attn/{n}_proj/kernel" for n in ("q", "k", "v", "o")}
PATHS |= {n: f"mlp/{n}_proj/kernel" for n in ("gate", "up", "down")}
BASIS = {"q": "k", "k": "k", "v": "k", "gate": "gate", "up": "gate"}
NORMS = {"k": "input_layernorm/scale", "gate": "post_attention_layernorm/scale"}
PUBLISHED = tuple(NORMS)
WINDOW, CALIBRATION = 512, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class BasisGate(WrapperArray):
    """``y = (z ∘ [|z| · norms > t]) U⁻¹W``, ``z = x U``; the first tokens stay dense."""

    base: CompressedArray
    rotation: jax.Array | None
    norms: jax.Array
    threshold: jax.Array
    first: int = dataclasses.field(metadata={"static": True})

    def materialize_matrix(self) -> jax.Array:
        """The matrix in the basis of x."""
        matrix = self.base.materialize_matrix()
        return matrix if self.rotation is None else self.rotation @ matrix

    def turned(self, x: jax.Array) -> jax.Array:
        """``z``."""
        return x if self.rotation is None else x @ self.rotation

    def scores(self, x: jax.Array) -> jax.Array:
        """What is compared with the threshold."""
        return jnp.abs(self.turned(x)) * self.norms[None]

    def ignored(self, x: jax.Array) -> jax.Array:
        """What the product takes as zero."""
        dense = jnp.arange(x.shape[0])[:, None] % WINDOW < self.first
        return (self.scores(x) <= self.threshold) & ~dense

    def matmul(self, x: jax.Array, *, out_dtype: Any = None) -> jax.Array:
        """The gated product."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base.matmul(
            jnp.where(self.ignored(rows), 0.0, self.turned(rows)), out_dtype=out_dtype
        )
        return y.reshape(*x.shape[:-1], -1)

    def matmul_transposed(self, x: jax.Array, *, out_dtype: Any = None) -> jax.Array:
        """Not gated."""
        return product(x, self.materialize_matrix().T, out_dtype)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A gate: the basis, the products whose inputs are weighted, and how many tokens stay dense."""

    rotated: bool
    weighted: tuple[str, ...]
    first: int

    def gate(self, block: dict, thresholds: dict[str, Any]) -> dict:
        """The parameters of a block with a gate before each product."""
        gated = jax.tree.map(lambda a: a, block)
        for name, path in PATHS.items():
            weight, rotation = leaf(block, path), None
            base = DenseArray.of(weight)
            if self.rotated and name in BASIS:
                # The scale of the norm belongs to the weights; the residual stream is rotated.
                scale = leaf(block, NORMS[BASIS[name]])
                scale = jnp.where(scale == 0, 1.0, scale)[:, None]
                rotation = left_singular_vectors(scale * leaf(block, PATHS[BASIS[name]]))
                base = DenseArray.of(rotation.T @ (scale * weight))
                rotation = rotation / scale
            norms = row_norms(base) if name in self.weighted else jnp.ones(weight.shape[0])
            threshold = jnp.float32(thresholds[path])
            leaf(gated, path[: -len("/kernel")])["kernel"] = BasisGate(
                base, rotation, norms, threshold, self.first
            )
        return gated


def left_singular_vectors(weight: jax.Array) -> jax.Array:
    """All of them, those of vanishing singular values too."""
    return jnp.asarray(np.linalg.svd(np.asarray(weight), full_matrices=True)[0])


def leaf(tree: dict, path: str) -> Any:
    """What lies at a path."""
    return functools.reduce(dict.__getitem__, path.split("/"), tree)


VARIANTS = {
    "plain": Variant(False, (), 0),
    "weighted": Variant(False, tuple(PATHS), 0),
    "published": Variant(True, PUBLISHED, 0),
    "plain, 4 tokens dense": Variant(False, (), 4),
    "published, 4 tokens dense": Variant(True, PUBLISHED, 4),
}


def same(weight: BasisGate) -> BasisGate:
    """What `observe` shall see."""
    return weight


def threshold_and_share(target: float, weight: BasisGate, x: jax.Array) -> jax.Array:
    """The quantile of the scores of the calibration windows; what is ignored in the others."""
    tokens = jnp.arange(CALIBRATION * WINDOW).reshape(-1, WINDOW)[:, weight.first :].reshape(-1)
    scores = weight.scores(x[tokens]).reshape(-1)[::7]  # a seventh of them is plenty, and quick
    share = jnp.mean(weight.ignored(x[CALIBRATION * WINDOW :]), dtype=jnp.float32)
    return jnp.stack([jnp.quantile(scores, target), share])


def product_errors(target: float, weight: BasisGate, x: jax.Array) -> jax.Array:
    """Variation of the row norms; errors over that with plain magnitudes: weighted, published."""
    x = x[:WINDOW]
    plain = DenseArray.of(weight.materialize_matrix())
    norms = row_norms(plain)

    def error(z: jax.Array, matrix: jax.Array, scores: jax.Array) -> jax.Array:
        lost = jnp.where(scores <= jnp.quantile(scores.reshape(-1)[::3], target), z, 0.0) @ matrix
        relative = jnp.linalg.norm(lost, axis=1) / jnp.linalg.norm(z @ matrix, axis=1)
        return jnp.sqrt(jnp.mean(relative**2))

    base = error(x, plain.matrix, jnp.abs(x))
    weighted = error(x, plain.matrix, jnp.abs(x) * norms[None])
    published = error(weight.turned(x), weight.base.materialize_matrix(), weight.scores(x))
    return jnp.stack([jnp.std(norms) / jnp.mean(norms), weighted / base, published / base])


def products(fn: Any, blocks: dict, x: jax.Array, target: float) -> dict[str, list]:
    """The three numbers of each product, mean and standard error over blocks."""
    statistic = functools.partial(product_errors, target)
    look = jax.jit(observe(fn, dict.fromkeys(PATHS.values(), (same, 3, statistic))))
    run, found, none = jax.jit(fn), [], dict.fromkeys(PATHS.values(), -1.0)
    for block in tqdm(blocks.values(), desc="products"):
        found.append(look(Variant(True, PUBLISHED, 0).gate(block, none), x))
        x = run(block, x)
    table = {}
    for path in PATHS.values():
        values = np.asarray([f[path] for f in found])
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        table[path] = np.stack([values.mean(axis=0), error], axis=1).tolist()
    return table


def perplexities(
    fn: Any, blocks: dict, x: jax.Array, variant: Variant, target: float, nll: Any
) -> dict[str, Any]:
    """Mean negative log-likelihood of every evaluation window, and the achieved sparsity."""
    statistic = functools.partial(threshold_and_share, target)
    look = jax.jit(observe(fn, dict.fromkeys(PATHS.values(), (same, 2, statistic))))
    run, shares, sizes = jax.jit(lutjax.lift(fn)), [], []
    for block in tqdm(blocks.values()):
        thresholds = dict.fromkeys(PATHS.values(), -1.0)  # nothing is ignored
        # Twice: o and down get other inputs when those of q, k, v, gate and up are masked.
        for _ in range(2):
            found = look(variant.gate(block, thresholds), x)
            thresholds = {path: values[0] for path, values in found.items()}
        gated = variant.gate(block, thresholds)
        found = look(gated, x)
        shares += [float(values[1]) for values in found.values()]
        sizes += [leaf(block, path).size for path in found]
        x = run(gated, x)
    return {"window_nll": nll(x), "achieved": float(np.average(shares, weights=sizes))}


def markdown(results: dict) -> str:
    """Both tables."""
    lines = ["| product | variation of row norms | weighted / plain | published / plain |"]
    lines.append("|---|---|---|---|")
    for path, values in results["products"].items():
        cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in values]
        lines.append(f"| {path.split('/')[1]} | " + " | ".join(cells) + " |")
    lines += ["", "| gate | perplexity | nats more than plain | achieved |", "|---|---|---|---|"]
    for name, r in results["runs"].items():
        nll = np.asarray(r["window_nll"])
        base = results["runs"]["plain, 4 tokens dense" if "dense" in name else "plain"]
        more = nll - np.asarray(base["window_nll"])
        error = more.std(ddof=1) / np.sqrt(len(more))
        lines.append(
            f"| {name} | {np.exp(nll.mean()):.2f} | {more.mean():+.3f} ± {error:.3f} "
            f"| {r['achieved']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4, help="of the evaluation text")
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sparsity")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, params, tokenizer = lutjax.load(demo_model_path())
    assert tokenizer is not None
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    calibration = windows(encode(calibration_text()), WINDOW, CALIBRATION)
    evaluation = windows(encode(evaluation_text()), WINDOW, args.windows)
    tokens = jnp.asarray(np.concatenate([calibration, evaluation]))
    fns, blocks, x = decoder_blocks(model.config, params, tokens)
    (fn,) = set(fns.values())

    @jax.jit
    def window_nll(x: jax.Array, tokens: jax.Array) -> jax.Array:
        scale = params["norm"]["scale"]
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
        logits = jax.nn.log_softmax((x * scale[None]) @ params["embed_tokens"]["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=1))

    def nll(x: jax.Array) -> list[float]:
        pairs = zip(x[CALIBRATION:], tokens[CALIBRATION:], strict=True)
        return [float(window_nll(*pair)) for pair in pairs]

    file = args.out / "wina.json"
    kind = {"windows": args.windows, "target": args.target}
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else kind | {"runs": {}}
    if {key: found.get(key) for key in kind} != kind:
        raise SystemExit(f"{file} was made with other windows or target; delete it to start anew")

    def save() -> None:
        replace_file(file, json.dumps(found, indent=1) + "\n")

    if "products" not in found:
        found["products"] = products(fn, blocks, x[:1], args.target)
        save()
    for name, variant in VARIANTS.items():
        if name not in found["runs"]:
            found["runs"][name] = perplexities(fn, blocks, x, variant, args.target, nll)
            save()
    (args.out / "wina.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
