"""Where each parameter of the decoder lies in a Hugging Face or GGUF checkpoint.

One table for the whole family: Llama, SmolLM2, Mistral, Qwen2, Qwen3 and Gemma use the same names,
but for the norms of blocks that normalise what they add (`DecoderConfig.post_norms`). The experts
of a block are one parameter, which `lutjax.io.experts` and `lutjax.io.gpt_oss` put together.
"""

from __future__ import annotations

import re
from typing import Literal

CheckpointFormat = Literal["hf", "gguf", "lutjax"]
"""``"lutjax"`` has every parameter under its path and as it is."""

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
        "layers/{i}/self_attn/sinks",
        "model.layers.{i}.self_attn.sinks",
        "blk.{i}.attn_sinks.weight",
    ),
    *(
        (
            f"layers/{{i}}/mlp/{name}/{parameter}",
            f"model.layers.{{i}}.mlp.{hf}.{suffix}",
            f"blk.{{i}}.ffn_{gguf}.{suffix}",
        )
        for parameter, suffix in (("kernel", "weight"), ("bias", "bias"))
        for name, hf, gguf in (
            ("router", "gate", "gate_inp"),
            *(
                (f"experts/{m}_proj", f"experts.{m}_proj", f"{m}_exps")
                for m in ("gate", "up", "down")
            ),
        )
    ),
    ("norm/scale", "model.norm.weight", "output_norm.weight"),
    ("lm_head/kernel", "lm_head.weight", "output.weight"),
)

# GGUF names a block's norms by what they do, Hugging Face by where they stand.
_BLOCK_NORMS = {
    False: {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    True: {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}

# By `post_norms`, then by path.
_NAMES: dict[bool, dict[str, dict[str, str]]] = {
    post_norms: {path: {"hf": hf, "gguf": gguf} for path, hf, gguf in _TABLE}
    | {
        f"layers/{{i}}/{name}/scale": {
            "hf": f"model.layers.{{i}}.{name}.weight",
            "gguf": f"blk.{{i}}.{gguf}.weight",
        }
        for name, gguf in norms.items()
    }
    for post_norms, norms in _BLOCK_NORMS.items()
}
_PATHS: dict[str, dict[str, str]] = {
    fmt: {names[fmt]: path for path, names in _NAMES[False].items()} for fmt in ("hf", "gguf")
}
_LAYER_PREFIX = {"hf": "model.layers.", "gguf": "blk."}

# Frequencies, which the configuration has, and what was measured to round attention and its cache,
# which are not rounded here.
_IGNORED = re.compile(
    r".*rotary_emb\.inv_freq|rope_freqs\.weight|.*\.self_attn\.(?:[kqv]_proj\.)?(?:[kqv]|kv)_scale"
)


def checkpoint_name(path: str, fmt: CheckpointFormat, *, post_norms: bool = False) -> str:
    """The name in a checkpoint of the parameter at `path`.

    Args:
      path: the parameter's path in the unrolled decoder.
      fmt: the checkpoint's format.
      post_norms: the decoder's; only names of norms depend on it.

    Raises:
      KeyError: if the decoder has no such parameter.

    >>> checkpoint_name("layers/7/mlp/up_proj/kernel", "gguf")
    'blk.7.ffn_up.weight'
    """
    if fmt == "lutjax":
        return path
    match = re.fullmatch(r"layers/(\d+)/(.*)", path)
    if match is None:
        return _NAMES[post_norms][path][fmt]
    return _NAMES[post_norms]["layers/{i}/" + match[2]][fmt].format(i=match[1])


def parameter_path(name: str, fmt: CheckpointFormat) -> str:
    """The inverse of `checkpoint_name` without `post_norms`.

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
    """Whether both foreign formats hold the transpose, `[*experts, out, in]`, of a parameter.

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
