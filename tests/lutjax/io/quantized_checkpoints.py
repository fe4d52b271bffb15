"""Quantised layers packed by plain loops, from what the formats' documentation says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import hf_tensors, random_values, write_hf

from lutjax.models import DecoderConfig

Layer = tuple[dict[str, np.ndarray], np.ndarray]
"""Tensors by suffix, and the weight [out, in] in float64."""


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as int32 words, without gaps."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<i4"))
    return np.stack(rows)


def gptq(shape, rng, *, bits, group, sym, shift, dtype=np.float16, act=False) -> Layer:
    n, k = shape
    group = k if group == -1 else group
    groups = -(-k // group)
    codes = rng.integers(0, 2**bits, (n, k))
    zeros = rng.integers(0, 2**bits, (n, groups))
    if sym:
        zeros = np.full_like(zeros, 2 ** (bits - 1))
    scales = rng.normal(size=(n, groups)).astype(dtype)
    g_idx = np.arange(k, dtype=np.int32) // group
    if act:
        rng.shuffle(g_idx)
    tensors = {
        "qweight": stream(codes, bits).T,
        "qzeros": stream((zeros.T - shift) % 2**bits, bits),
        "scales": scales.T,
        "g_idx": g_idx,
    }
    weight = (codes - zeros[:, g_idx]) * scales.astype(np.float64)[:, g_idx]
    # A float32 scale times an integer is rounded once; of two bytes it is exact.
    return tensors, weight.astype(np.float32).astype(np.float64)


def awq_words(codes: np.ndarray) -> np.ndarray:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, column] |= (codes[:, 8 * column + output] << (4 * place)).astype(np.uint32)
    return words.view(np.int32)


def awq(shape, rng, *, group) -> Layer:
    n, k = shape
    codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // group))
    scales = rng.normal(size=(n, k // group)).astype(np.float16)
    tensors = {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scales.T}
    g_idx = np.arange(k) // group
    return tensors, (codes - zeros[:, g_idx]) * scales.astype(np.float64)[:, g_idx]


def bitsandbytes(shape, rng, *, kind, double) -> Layer:
    n, k = shape
    block, nested = 64, 16
    codes = rng.integers(0, 16, n * k)
    table = np.sort(rng.normal(size=16)).astype(np.float32)
    count = n * k // block
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "shape": [n, k]}
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.quant_map": table,
    }
    scales = np.abs(rng.normal(size=count)).astype(np.float32)
    if double:
        state |= {"nested_blocksize": nested, "nested_offset": 0.25, "nested_dtype": "float32"}
        values = rng.integers(0, 256, count).astype(np.uint8)
        steps = np.abs(rng.normal(size=-(-count // nested))).astype(np.float32)
        map_ = np.linspace(-1, 1, 256, dtype=np.float32)
        tensors |= {"weight.nested_absmax": steps, "weight.nested_quant_map": map_}
        scales = np.array(
            [map_[v] * steps[i // nested] + np.float32(0.25) for i, v in enumerate(values)]
        )
        tensors["weight.absmax"] = values
    else:
        tensors["weight.absmax"] = scales
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
    # One product in float32, as the kernels compute it.
    weight = [table[c] * scales[i // block] for i, c in enumerate(codes)]
    return tensors, np.array(weight, np.float64).reshape(n, k)


def compressed_tensors(shape, rng, *, bits, group, sym, dtype, act=False) -> Layer:
    n, k = shape
    group = k if group == -1 else group
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (n, k))
    zeros = np.zeros((n, k // group), int) if sym else rng.integers(-half, half, (n, k // group))
    scales = rng.normal(size=(n, k // group)).astype(dtype)
    g_idx = np.arange(k, dtype=np.int32) // group
    tensors = {
        "weight_packed": stream(codes + half, bits),
        "weight_scale": scales,
        "weight_shape": np.array([n, k]),
    }
    if not sym:
        tensors["weight_zero_point"] = stream(zeros.T + half, bits).T
    if act:
        rng.shuffle(g_idx)
        tensors["weight_g_idx"] = g_idx
    weight = (codes - zeros[:, g_idx]) * scales.astype(np.float64)[:, g_idx]
    # A float32 scale times an integer is rounded once; of two bytes it is exact.
    return tensors, weight.astype(np.float32).astype(np.float64)


def byte_weights(shape, rng, *, dtype, scale, scales, scale_dtype=np.float32) -> Layer:
    """`scales` is the shape of the scales, or the block that shares one."""
    n, k = shape
    if dtype == "I8":
        stored = rng.integers(-128, 128, (n, k)).astype(np.int8)
    else:
        codes = rng.integers(0, 0x7F, (n, k)) | rng.integers(0, 2, (n, k)) << 7
        stored = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    rows, columns = {"matrix": (n, k), "output": (1, k)}.get(scales, scales)
    values = rng.normal(size=(-(-n // rows), -(-k // columns)))
    if scale_dtype == np.uint8:
        exponents = rng.integers(107, 147, values.shape)
        values, kept = 2.0 ** (exponents - 127), exponents.astype(np.uint8)
    else:
        kept = values.astype(scale_dtype)
        values = kept.astype(np.float64)
    wide = values[np.arange(n)[:, None] // rows, np.arange(k) // columns]
    weight = stored.astype(np.float64) * wide
    tensors = {"weight": stored, scale: kept.reshape(()) if scales == "matrix" else kept}
    tensors["input_scale"] = np.ones((), np.float32)
    # A float32 scale times a byte is rounded once; all others are exact.
    return tensors, weight.astype(np.float32).astype(np.float64)


def float4(shape, rng, *, codes, factor, divides=False, group=16) -> Layer:
    n, k = shape
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = rng.integers(0, 16, (n, k))
    packed = (numbers[:, ::2] | numbers[:, 1::2] << 4).astype(np.uint8)
    tensors = {codes: packed}
    whole = np.float32(1)
    if factor is None:
        exponents = rng.integers(107, 147, (n, k // group)).astype(np.uint8)
        tensors["weight_scale"] = exponents
        scales = 2.0 ** (exponents.astype(int) - 127)
    else:
        bytes_ = rng.integers(0, 0x7F, (n, k // group)).astype(np.uint8)
        tensors["weight_scale"] = bytes_.view(ml_dtypes.float8_e4m3fn)
        scales = tensors["weight_scale"].astype(np.float64)
        whole = np.float32(rng.uniform(1, 1000))
        tensors[factor] = np.full(1 if divides else (), whole, np.float32)
    levels = np.array(values + [-value for value in values], np.float32)
    levels = levels / whole if divides else levels * whole
    weight = levels[numbers] * scales.astype(np.float32)[:, np.arange(k) // group]
    return tensors, weight.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of checkpoint.

    Attributes:
      config: its quantization_config.
      layer: makes a layer of a shape.
      bits_per_weight: as kept, for layers of 64 inputs, without the table.
      reordered: whether columns are sorted before they are grouped.
    """

    config: dict[str, Any]
    layer: Callable[..., Layer]
    bits_per_weight: float
    reordered: bool = False


def _asymmetric(bits: int, group: int) -> float:
    """Bits a weight: scales and steps of two bytes, zero points padded to a block of 8 groups."""
    return bits + 32 / group + bits * 8 / 64


def gptq_case(bits, group, sym, layout, bits_per_weight, act=False, dtype=np.float16) -> Case:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
    config |= {"checkpoint_format": layout, "desc_act": act}
    shift = 1 if layout == "gptq" else 0
    options = {"bits": bits, "group": group, "sym": sym, "shift": shift, "act": act, "dtype": dtype}
    reordered = act and group != -1  # a single group has no order
    return Case(config, lambda *a: gptq(*a, **options), bits_per_weight, reordered)


def bitsandbytes_case(kind, double) -> Case:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config |= {"bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": "uint8"}
    return Case(config, lambda *a: bitsandbytes(*a, kind=kind, double=double), 4.5)


def compressed_case(bits, group, sym, dtype, bits_per_weight, act=False) -> Case:
    strategy = "channel" if group == -1 else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy}
    weights["group_size"] = None if group == -1 else group
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"config_groups": {"group_0": scheme}, "quantization_status": "compressed"}
    config["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj"]
    options = {"bits": bits, "group": group, "sym": sym, "dtype": dtype, "act": act}
    return Case(config, lambda *a: compressed_tensors(*a, **options), bits_per_weight, act)


def scheme_case(kind, weights, bits_per_weight, layer, **options) -> Case:
    activations = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": {"symmetric": True} | weights}
    scheme["input_activations"] = activations
    config = {"quant_method": "compressed-tensors", "format": kind}
    config |= {"config_groups": {"group_0": scheme}, "quantization_status": "compressed"}
    config["ignore"] = ["lm_head", "model.layers.0.mlp.down_proj"]
    return Case(config, lambda *a: layer(*a, **options), bits_per_weight)


def bytes_case(kind, weights, bits_per_weight, **options) -> Case:
    dtype = "I8" if weights["type"] == "int" else "F8_E4M3"
    options = {"dtype": dtype, "scale": "weight_scale"} | options
    return scheme_case(kind, {"num_bits": 8} | weights, bits_per_weight, byte_weights, **options)


def fp8_case(block, bits_per_weight, scale="weight_scale_inv") -> Case:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    options = {
        "dtype": "F8_E4M3",
        "scale": scale,
        "scales": tuple(block) if block else "matrix",
    }
    return Case(config, lambda *a: byte_weights(*a, **options), bits_per_weight)


MODELOPT = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8}}

CASES: dict[str, Case] = {
    "gptq-2": gptq_case(2, 32, False, "gptq", _asymmetric(2, 32)),
    "gptq-3": gptq_case(3, 32, False, "gptq", _asymmetric(3, 32)),
    "gptq-4": gptq_case(4, 32, False, "gptq", _asymmetric(4, 32)),
    "gptq-8": gptq_case(8, 32, False, "gptq", _asymmetric(8, 32)),
    "gptq-4-sym": gptq_case(4, 32, True, "gptq", 4 + 16 / 32),
    "gptq-3-sym-column": gptq_case(3, -1, True, "gptq", 3 + 16 / 64),
    "gptq-8-bfloat16": gptq_case(
        8, 16, False, "gptq", _asymmetric(8, 16), dtype=ml_dtypes.bfloat16
    ),
    "gptq-8-sym-float32": gptq_case(8, 32, True, "gptq", 8 + 32 / 32, dtype=np.float32),
    "gptq_v2-4": gptq_case(4, 32, False, "gptq_v2", _asymmetric(4, 32)),
    "gptq_v2-2-sym": gptq_case(2, 32, True, "gptq_v2", 2 + 16 / 32),
    "gptq-4-act": gptq_case(4, 32, False, "gptq", _asymmetric(4, 32), act=True),
    "gptq-4-act-column": gptq_case(4, -1, True, "gptq", 4 + 16 / 64, act=True),
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        lambda *a: awq(*a, group=32),
        _asymmetric(4, 32),
    ),
    "nf4": bitsandbytes_case("nf4", False),
    "nf4-double": bitsandbytes_case("nf4", True),
    "fp4": bitsandbytes_case("fp4", False),
    "compressed-4": compressed_case(4, 32, True, ml_dtypes.bfloat16, 4 + 16 / 32),
    "compressed-4-asym": compressed_case(4, 32, False, ml_dtypes.bfloat16, _asymmetric(4, 32)),
    "compressed-8-column": compressed_case(8, -1, True, np.float32, 8 + 32 / 64),
    "compressed-4-act": compressed_case(4, 32, True, np.float16, 4 + 16 / 32, act=True),
    "compressed-int8": bytes_case(
        "int-quantized",
        {"type": "int", "strategy": "channel"},
        8 + 16 / 64,
        scales="output",
        scale_dtype=ml_dtypes.bfloat16,
    ),
    "compressed-fp8": bytes_case(
        "float-quantized", {"type": "float", "strategy": "tensor"}, 8 + 32 / 64, scales="matrix"
    ),
    "compressed-fp8-block": bytes_case(
        "float-quantized",
        {"type": "float", "strategy": "block", "block_structure": [40, 32]},
        8 + 32 / 32,
        scales=(40, 32),
    ),
    "compressed-fp8-group": bytes_case(
        "naive-quantized",
        {"type": "float", "strategy": "group", "group_size": 16},
        8 + 16 / 16,
        scales=(1, 16),
        scale_dtype=np.float16,
    ),
    "mxfp8": bytes_case(
        "mxfp8-quantized",
        {"type": "float", "strategy": "group", "group_size": 32},
        8 + 16 / 32,
        scales=(1, 32),
        scale_dtype=np.uint8,
    ),
    "compressed-nvfp4": scheme_case(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        4 + 16 / 16,
        float4,
        codes="weight_packed",
        factor="weight_global_scale",
        divides=True,
    ),
    "compressed-mxfp4": scheme_case(
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        4 + 16 / 32,
        float4,
        codes="weight_packed",
        factor=None,
        group=32,
    ),
    "fp8": fp8_case([16, 32], 8 + 32 / 32),
    "fp8-matrix": fp8_case(None, 8 + 32 / 64),
    "fp8-other-name": fp8_case(None, 8 + 32 / 64, "weight_scale"),  # AutoFP8's
    "modelopt-fp8": Case(
        MODELOPT | {"quant_algo": "FP8"},
        lambda *a: byte_weights(*a, dtype="F8_E4M3", scale="weight_scale", scales="matrix"),
        8 + 32 / 64,
    ),
    "modelopt-nvfp4": Case(
        MODELOPT | {"quant_algo": "NVFP4"},
        lambda *a: float4(*a, codes="weight", factor="weight_scale_2"),
        4 + 16 / 16,
    ),
}


def write_quantized(
    directory: Path, config: DecoderConfig, case: Case
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Writes a checkpoint whose layers are quantised but for the first `down_proj` and the head.

    Returns its tensors, and the expected value of every parameter by name in the checkpoint.
    """
    rng = np.random.default_rng(0)
    tensors, expected = {}, {}
    for name, value in hf_tensors(random_values(config)).items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and module != "model.layers.0.mlp.down_proj":
            parts, weight = case.layer(value.shape, rng)
            tensors |= {
                f"{module}.{suffix}": np.ascontiguousarray(part) for suffix, part in parts.items()
            }
            expected[name] = weight
        else:
            tensors[name] = expected[name] = value.astype(np.float16)
    write_tensors(directory, config, case.config, tensors)
    return tensors, expected


def write_tensors(
    directory: Path, config: DecoderConfig, quantization: Any, tensors: dict[str, np.ndarray]
) -> None:
    write_hf(directory, config, tensors)
    path = directory / "config.json"
    data = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(data))
