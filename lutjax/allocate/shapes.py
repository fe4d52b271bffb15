"""Shapes of well-known models, to plan for them without their weights."""

from __future__ import annotations

import dataclasses

from lutjax.allocate.plan import Matrix


@dataclasses.dataclass(frozen=True)
class ModelShapes:
    """The sizes that decide the shapes of a Llama-like decoder.

    >>> round(MODELS["llama-2-70b"].total_weights / 1e9, 2)
    68.98
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    post_norms: bool = False
    qk_norm: bool = False

    def matrices(self) -> tuple[Matrix, ...]:
        """The seven linear matrices of each layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "self_attn/q_proj": (self.hidden, queries),
            "self_attn/k_proj": (self.hidden, keys),
            "self_attn/v_proj": (self.hidden, keys),
            "self_attn/o_proj": (queries, self.hidden),
            "mlp/gate_proj": (self.hidden, self.intermediate),
            "mlp/up_proj": (self.hidden, self.intermediate),
            "mlp/down_proj": (self.intermediate, self.hidden),
        }
        return tuple(
            Matrix(f"layers/{i}/{name}/kernel", k, n)
            for i in range(self.layers)
            for name, (k, n) in shapes.items()
        )

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding table and, if it is another, the output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norm_weights(self) -> int:
        """Weights of the norms."""
        block = self.hidden * (4 if self.post_norms else 2) + 2 * self.head_dim * self.qk_norm
        return self.layers * block + self.hidden

    @property
    def total_weights(self) -> int:
        """All weights."""
        planned = sum(matrix.size for matrix in self.matrices())
        return planned + self.embedding_weights + self.norm_weights


MODELS: dict[str, ModelShapes] = {
    "smollm2-135m": ModelShapes(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "llama-2-7b": ModelShapes(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-2-13b": ModelShapes(5120, 13824, 40, 40, 40, 128, 32000),
    "llama-2-70b": ModelShapes(8192, 28672, 80, 64, 8, 128, 32000),
    "llama-3-8b": ModelShapes(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-70b": ModelShapes(8192, 28672, 80, 64, 8, 128, 128256),
    "mistral-7b": ModelShapes(4096, 14336, 32, 32, 8, 128, 32000),
}
"""Models by name."""


def model_shapes(name: str) -> ModelShapes:
    """The shapes of the named model.

    Raises:
      ValueError: For an unknown name; lists those known.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known shapes: {', '.join(MODELS)}")
    return MODELS[name]
