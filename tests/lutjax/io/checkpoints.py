"""Small checkpoints for the tests to write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lutjax.io import gpt_oss
from lutjax.io.checkpoint import parameter_shapes
from lutjax.io.configs import config_to_hf
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.models import DecoderConfig, RopeScaling

GEMMA = {
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "scale_embeddings": True,
    "tie_embeddings": True,
}
FAMILIES_OF_GEMMA = {
    "gemma": GEMMA | {"model_type": "gemma"},
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "post_norms": True,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "sliding_window": 5,
        "sliding_layers": (True, False),
    },
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "post_norms": True,
        "qk_norm": True,
        "rope_theta": 1e6,
        "rope_scaling": RopeScaling("linear", factor=8.0),
        "sliding_window": 5,
        "sliding_layers": (True, False),
        "sliding_rope_theta": 1e4,
    },
}
"""Changes to a configuration of two layers."""


FAMILIES_OF_EXPERTS = {
    "mixtral": {"model_type": "mixtral", "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "qk_norm": True,
        "num_experts": 3,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "activation": "gelu_sigmoid",
        "swiglu_limit": 7.0,
        "qkv_bias": True,
        "o_bias": True,
        "attention_sinks": True,
        "expert_bias": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "sliding_layers": (True, False),
        "rope_theta": 150000.0,
        "rope_scaling": RopeScaling(
            "yarn", 32.0, 1.0, 32.0, 4096, attention_factor=1.3465735902799727, truncate=False
        ),
    },
}


def random_values(config: DecoderConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def hf_tensors(values: dict[str, np.ndarray], family: str | None = None) -> dict[str, np.ndarray]:
    """The tensors of a family; only those of mixtures are not as the others'."""
    if family == "gpt_oss":
        return gpt_oss_tensors(values)
    tensors = {}
    for path, value in values.items():
        name = checkpoint_name(path, "hf", post_norms=post_norms(values))
        stored = value.swapaxes(-1, -2) if is_transposed(path) else value
        if stored.ndim == 3:  # a tensor for each expert
            for i, expert in enumerate(stored):
                tensors[name.replace("experts.", f"experts.{i}.")] = np.ascontiguousarray(expert)
        else:
            tensors[name] = np.ascontiguousarray(stored)
    if family != "mixtral":
        return tensors
    names = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def gpt_oss_tensors(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    plain = {path: value for path, value in values.items() if "/experts/" not in path}
    tensors = {gpt_oss.checkpoint_name(name): tensor for name, tensor in hf_tensors(plain).items()}
    for path, gate in values.items():
        layer, _, name = path.partition("/mlp/experts/")
        prefix = f"model.{layer.replace('/', '.')}.mlp.experts"
        suffix = "_bias" if name.endswith("bias") else ""
        if name.startswith("down_proj"):
            tensors[f"{prefix}.down_proj{suffix}"] = gate
        elif name.startswith("gate_proj"):
            up = values[path.replace("gate_proj", "up_proj")]
            both = np.stack([gate, up], axis=-1)  # they alternate
            tensors[f"{prefix}.gate_up_proj{suffix}"] = both.reshape(*gate.shape[:-1], -1)
    return tensors


def post_norms(values: dict[str, np.ndarray]) -> bool:
    """Whether these are parameters of a decoder with `post_norms`."""
    return "layers/0/post_feedforward_layernorm/scale" in values


def write_hf(
    directory: Path, config: DecoderConfig, tensors: dict[str, np.ndarray], shards: int = 1
) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
