"""Where each parameter of the decoder lies in a Hugging Face or GGUF checkpoint.

One table for the whole family: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 use the same names.
"""

from __future__ import annotations

import re
from typing import Literal

CheckpointFormat = Literal["hf", "gguf"]

# Parameter path, Hugging Face name, GGUF name; {i} is the layer. Kernels are [in, out] here and
# [out, in] in both formats; everything else has the same shape in all three.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    *(
        (
            f"layers/{{i}}/self_attn/{name}_proj/{parameter}",
            f"model.layers.{{i}}.self_attn.{name}_proj.{suffix}",
            f"blk.{{i}}.attn_{gguf}.{suffix}",
        )
        for parameter, suffix in (("kernel", "weight"), ("bias", "bias"))
        for name, gguf in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    ),
    *(
        (
            f"layers/{{i}}/self_attn/{name}_norm/scale",
            f"model.layers.{{i}}.self_attn.{name}_norm.weight",
            f"blk.{{i}}.attn_{name}_norm.weight",
        )
        for name in ("q", "k")
    ),
    *(
        (
            f"layers/{{i}}/mlp/{name}_proj/kernel",
            f"model.layers.{{i}}.mlp.{name}_proj.weight",
            f"blk.{{i}}.ffn_{name}.weight",
        )
        for name in ("gate", "up", "down")
    ),
    (
        "layers/{i}/input_layernorm/scale",
        "model.layers.{i}.input_layernorm.weight",
        "blk.{i}.attn_norm.weight",
    ),
    (
        "layers/{i}/post_attention_layernorm/scale",
        "model.layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
    ("norm/scale", "model.norm.weight", "output_norm.weight"),
    ("lm_head/kernel", "lm_head.weight", "output.weight"),
)

_NAMES = {path: {"hf": hf, "gguf": gguf} for path, hf, gguf in _TABLE}

_PATHS: dict[str, dict[str, str]] = {
    fmt: {names[fmt]: path for path, names in _NAMES.items()} for fmt in ("hf", "gguf")
}
_LAYER_PREFIX = {"hf": "model.layers.", "gguf": "blk."}

# Tensors that say nothing the configuration does not say.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight")


def checkpoint_name(path: str, fmt: CheckpointFormat) -> str:
    """The name in a checkpoint of the parameter at `path`.

    Raises:
      KeyError: if the decoder has no such parameter.

    >>> checkpoint_name("layers/7/mlp/up_proj/kernel", "gguf")
    'blk.7.ffn_up.weight'
    """
    match = re.fullmatch(r"layers/(\d+)/(.*)", path)
    if match is None:
        return _NAMES[path][fmt]
    return _NAMES["layers/{i}/" + match[2]][fmt].format(i=match[1])


def parameter_path(name: str, fmt: CheckpointFormat) -> str:
    """The inverse of `checkpoint_name`.

    Raises:
      KeyError: if the decoder has no parameter of that name.

    >>> parameter_path("blk.7.ffn_up.weight", "gguf")
    'layers/7/mlp/up_proj/kernel'
    """
    match = re.fullmatch(re.escape(_LAYER_PREFIX[fmt]) + r"(\d+)\.(.*)", name)
    if match is None:
        return _PATHS[fmt][name]
    return _PATHS[fmt][f"{_LAYER_PREFIX[fmt]}{{i}}.{match[2]}"].format(i=match[1])


def is_transposed(path: str) -> bool:
    """Whether the checkpoint holds the transpose, [out, in], of the parameter at `path`.

    >>> is_transposed("lm_head/kernel"), is_transposed("embed_tokens/embedding")
    (True, False)
    """
    return path.endswith("/kernel")


def is_ignored(name: str) -> bool:
    """Whether a checkpoint's tensor is one that the decoder does without.

    >>> is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    True
    """
    return _IGNORED.fullmatch(name) is not None
