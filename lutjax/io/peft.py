"""Adapters in the format of Hugging Face's PEFT: a configuration and safetensors.

PEFT computes `y = x Wᵀ + s (x Aᵀ) Bᵀ` with `A [r, in]`, `B [out, r]` and the scale s = alpha / r
(alpha / sqrt(r) for rsLoRA, arXiv 2312.03732). Here `y = x W + (x left) right`, so `left = Aᵀ` and
`right = s Bᵀ`. Only two-dimensional kernels of the decoder occur.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float

from lutjax.arrays import LowRankArray
from lutjax.io.names import checkpoint_name, parameter_path
from lutjax.io.new_directory import new_directory
from lutjax.io.safetensors import SafetensorsReader, read_json

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_HEAD = _PREFIX + "score.weight"
_TENSOR = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# Options under which the formula above is not what PEFT computes.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
)

# Initialisations that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) change it.
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")


def save_peft(
    directory: str | Path,
    adapter: Mapping[str, LowRankArray],
    *,
    base_model: str | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    head: Float[Array, "d c"] | None = None,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads.

    The base in PEFT must be the one that the adapter was trained on. After LQ-LoRA that is the
    quantised part, not the original model: ship the compressed checkpoint (`lutjax.save`), or
    write the `lutjax.adapters.lora.difference` to the original.

    Args:
      directory: the directory to make; nothing may be there.
      adapter: low-rank parts by parameter path of the unrolled decoder.
      base_model: hub id or path of the base, which PEFT can load on its own.
      alpha: PEFT's `lora_alpha`; by default such that the scale is 1. Only the division of the
        product between B and the scale depends on it.
      rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
      head: `float[D, C]`, the trained head of a classifier of C classes, as in transformers'
        `AutoModelForSequenceClassification`.

    Raises:
      FileExistsError: if something is at `directory`.
      ValueError: if the adapter is empty, or a part is not a kernel of the unrolled decoder.
    """
    if not adapter:
        raise ValueError("the adapter has no parts; there is nothing to save")
    modules: dict[str, str] = {path: _module(path, part) for path, part in adapter.items()}
    ranks = {module: adapter[path].rank for path, module in modules.items()}
    rank = max(ranks.values())
    if alpha is None:
        alpha = math.sqrt(rank) if rslora else float(rank)
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha={alpha} must be positive")
    tensors: dict[str, np.ndarray] = {}
    for path, module in modules.items():
        part = adapter[path]
        scale = _scale(alpha, part.rank, rslora)
        left, right = (np.asarray(f.astype(jnp.float32)) for f in (part.left, part.right))
        dtype = np.dtype(part.left.dtype)
        for name, factor in (("A", left.T), ("B", right.T / np.float32(scale))):
            values = np.ascontiguousarray(factor).astype(dtype)
            tensors[f"{_PREFIX}{module}.lora_{name}.weight"] = values
    if head is not None:
        tensors[_HEAD] = np.ascontiguousarray(np.asarray(head).T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": {_pattern(m): r for m, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None if head is None else ["score"],
        "inference_mode": True,
    }
    with new_directory(directory) as temporary:
        metadata = {"format": "pt"}
        # save_file would keep others from reading it.
        content = safetensors.numpy.save(tensors, metadata=metadata)
        (temporary / TENSORS_NAME).write_bytes(content)
        text = json.dumps(config, indent=2) + "\n"
        (temporary / CONFIG_NAME).write_text(text, encoding="utf-8")


def load_peft(directory: str | Path, *, dtype: Any = None) -> dict[str, LowRankArray]:
    """Reads a LoRA adapter that PEFT wrote.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      dtype: dtype of the factors; what is stored by default.

    Returns:
      Low-rank parts by parameter path, the scale folded into `right`; put them on a model with
      `lutjax.adapters.lora.attach`. The head of a classifier is for `load_peft_head`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is not sound, a factor is missing or misshapen, holds NaN or Inf, or
        the adapter is of a kind that is not plain LoRA on the decoder's kernels.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG_NAME)
    _refuse_unsupported(config, directory / CONFIG_NAME)
    if not (directory / TENSORS_NAME).is_file():
        raise FileNotFoundError(
            f"{directory} has no {TENSORS_NAME}; a pickled adapter_model.bin is never read: save "
            "it again with safe_serialization=True"
        )
    reader = SafetensorsReader.open_file(directory / TENSORS_NAME)
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name in reader.infos:
        if name == _HEAD:
            continue
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{directory / TENSORS_NAME}: tensor {name!r} is no LoRA factor of a kernel"
            )
        values = reader.read(name)
        if not np.isfinite(values.astype(np.float32)).all():
            raise ValueError(f"{directory / TENSORS_NAME}: {name!r} holds NaN or infinite values")
        factors.setdefault(match["module"], {})[match["factor"]] = values
    if not factors:
        raise ValueError(f"{directory / TENSORS_NAME} has no tensors")
    return {
        _path(module, directory): _low_rank(module, pair, config, dtype, directory)
        for module, pair in factors.items()
    }


def load_peft_head(directory: str | Path) -> Float[Array, "d c"]:
    """Reads the head of a classifier that was saved with its adapter.

    Args:
      directory: as in :func:`load_peft`.

    Returns:
      `float[D, C]`.

    Raises:
      ValueError: if there is none.
    """
    file = Path(directory) / TENSORS_NAME
    reader = SafetensorsReader.open_file(file)
    if _HEAD not in reader.infos:
        raise ValueError(f"{file} has no {_HEAD!r}: it is no adapter of a classifier")
    return jnp.asarray(np.ascontiguousarray(reader.read(_HEAD).T))


def _module(path: str, part: LowRankArray) -> str:
    """The name of the Hugging Face module whose weight is at `path`."""
    try:
        name = checkpoint_name(path, "hf")
    except KeyError:
        name = ""
    if not path.endswith("/kernel") or "/router/" in path or not name or part.left.ndim != 2:
        raise ValueError(
            f"{path!r} ({part!r}) is no kernel of the unrolled decoder; PEFT adapters are made of "
            "those (use unstack_layers if layers are stacked)"
        )
    return name.removesuffix(".weight")


def _pattern(module: str) -> str:
    """A key of PEFT's patterns; some of its versions want a dot before what they match."""
    return re.escape(module.removeprefix("model."))


def _path(module: str, directory: Path) -> str:
    try:
        return parameter_path(f"{module}.weight", "hf")
    except KeyError:
        raise ValueError(
            f"{directory}: the adapter is for {module!r}, which the decoder does not have"
        ) from None


def _scale(alpha: float, rank: int, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _alpha(config: Mapping[str, Any], module: str) -> float:
    """PEFT's rule: the first pattern that matches the end of the name, else `lora_alpha`."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config["lora_alpha"])


def _low_rank(
    module: str,
    pair: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    dtype: Any,
    directory: Path,
) -> LowRankArray:
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{directory}: {module!r} lacks its factor { {'A', 'B'} - set(pair) }")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{directory}: the factors A {a.shape} and B {b.shape} of {module!r} do not fit "
            "[r, in] and [out, r]"
        )
    scale = _scale(_alpha(config, module), a.shape[0], bool(config.get("use_rslora")))
    dtype = a.dtype if dtype is None else jnp.dtype(dtype)
    left = np.ascontiguousarray(a.T).astype(dtype)
    right = np.ascontiguousarray(b.T.astype(np.float32) * np.float32(scale)).astype(dtype)
    return LowRankArray.of(jax.device_put(left), jax.device_put(right))


def _refuse_unsupported(config: Mapping[str, Any], source: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source}: peft_type={config.get('peft_type')!r}; only 'LORA' is read")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise ValueError(f"{source}: {field}={config[field]!r} is not plain LoRA")
    start = config.get("init_lora_weights")
    if start not in _BASE_UNCHANGED:
        raise ValueError(
            f"{source}: init_lora_weights={start!r} changes the base, so that the adapter does not "
            "fit the original; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{source}: bias={config['bias']!r}; only 'none' is read")
    # PEFT names both heads that a classifier may have; this one's is called score.
    if set(config.get("modules_to_save") or ()) - {"score", "classifier"}:
        raise ValueError(
            f"{source}: modules_to_save={config['modules_to_save']!r}: whole modules are not read"
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise ValueError(f"{source}: lora_alpha={alpha!r} is no number")
