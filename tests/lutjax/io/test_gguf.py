from __future__ import annotations

import dataclasses
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import FAMILIES_OF_EXPERTS, FAMILIES_OF_GEMMA, post_norms, random_values
from tiny_checkpoint import assert_same_bits, tiny_tokenizer

import lutjax
from lutjax.arrays import LutArray
from lutjax.io import gpt_oss, load, load_params, load_tokenizer, open_checkpoint
from lutjax.io.blocks import CodedScales
from lutjax.io.checkpoint import parameter_shapes
from lutjax.io.configs import config_from_gguf
from lutjax.io.grid import abstract_grid_array, grid_array
from lutjax.io.names import checkpoint_name, is_transposed
from lutjax.io.readers import read_bytes
from lutjax.models import Decoder, DecoderConfig, RopeScaling

Q = gguf.GGMLQuantizationType


@pytest.fixture
def config() -> DecoderConfig:
    """Row lengths are multiples of the block of 32."""
    return DecoderConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=99,
    )


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, as its convert_hf_to_gguf.py writes it."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


FLOAT16_AT = {
    Q.Q2_K: (80, 82),
    Q.Q3_K: (108,),
    Q.Q4_K: (0, 2),
    Q.Q5_K: (0, 2),
    Q.Q6_K: (208,),
    Q.IQ4_NL: (0,),
    Q.IQ4_XS: (0,),
    Q.NVFP4: (),
    Q.Q1_0: (0,),
}
"""Where the blocks have float16 numbers, for the types that the gguf package does not write."""


def random_blocks(kind, shape) -> np.ndarray:
    """Any bytes are a block, if its float16 numbers are finite."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    *rows, columns = shape
    blocks = rng.integers(0, 256, (*rows, columns // size, block_bytes), np.uint8)
    for at in FLOAT16_AT[kind]:
        number = rng.normal(size=blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = number[..., None].view(np.uint8)
    return blocks.reshape(*rows, -1)


def write_gguf(path, config, values, kind=Q.F32, metadata=(), numbers=(), extra=()):
    arch = config.model_type.removesuffix("_text")
    arch = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}.get(arch, arch)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if config.model_type in ("qwen3_moe", "gpt_oss"):
        writer.add_feed_forward_length(7)  # that of layers without experts, of which there are none
        writer.add_expert_feed_forward_length(config.intermediate_size)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
    if config.num_experts is not None:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling.kind))
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
        if config.rope_scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(
                config.rope_scaling.original_max_position_embeddings
            )
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in metadata:
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    for key, value in dict(numbers).items():
        writer.add_uint32(key, value)
    for name, value in values.items():
        tensor = value.swapaxes(-1, -2) if is_transposed(name) else value
        if arch == "llama" and ("/q_proj/" in name or "/k_proj/" in name):
            tensor = permuted(tensor, config.num_heads if "/q_" in name else config.num_kv_heads)
        if name.endswith("/scale"):
            tensor = tensor + np.float32(config.norm_offset)
        tensor = np.ascontiguousarray(tensor)
        quantised = kind if tensor.ndim > 1 and "router" not in name else Q.F32
        if quantised in FLOAT16_AT:
            data = random_blocks(quantised, tensor.shape)
        else:
            data = gguf.quantize(tensor, quantised)
        label = checkpoint_name(name, "gguf", post_norms=post_norms(values))
        if arch == "gpt-oss":
            label = gpt_oss.checkpoint_name(label)
        writer.add_tensor(label, data, raw_dtype=quantised)
    for name, tensor in extra:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": True},
        {"model_type": "qwen2", "qkv_bias": True},
        {"model_type": "qwen3", "qk_norm": True},
        *(family | {"norm_topk_prob": True} for family in FAMILIES_OF_EXPERTS.values()),
    ],
)
def test_float32_is_read_back_exactly(tmp_path, config, change):
    config = dataclasses.replace(config, **change)
    values = random_values(config)
    write_gguf(tmp_path / "m.gguf", config, values)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config == config
    for path, value in checkpoint.parameters():
        np.testing.assert_array_equal(value, values[path], err_msg=path)


# llama.cpp's files do not say what queries are scaled by, nor which layers have the window.
GEMMA_IN_GGUF = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": None},
    "gemma3": {"num_layers": 7, "sliding_layers": (True,) * 5 + (False, True)},
}


@pytest.mark.parametrize("family", GEMMA_IN_GGUF)
def test_gemma_is_read_back_exactly(tmp_path, config, family):
    config = dataclasses.replace(config, **FAMILIES_OF_GEMMA[family] | GEMMA_IN_GGUF[family])
    values = random_values(config)
    for path in values:
        if path.endswith("/scale"):  # as Gemma's own checkpoints have them, so 1 is added exactly
            values[path] = values[path].astype(ml_dtypes.bfloat16).astype(np.float32)
    write_gguf(tmp_path / "m.gguf", config, values)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config == config
    for path, value in checkpoint.parameters():
        np.testing.assert_array_equal(value, values[path], err_msg=path)


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_1, Q.Q3_K, Q.MXFP4])
def test_quantised_experts_are_kept(tmp_path, config, kind):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    sizes = sizes if kind in FLOAT16_AT else {}
    config = dataclasses.replace(config, **FAMILIES_OF_EXPERTS["qwen3_moe"], **sizes)
    write_gguf(tmp_path / "m.gguf", config, random_values(config), kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    path = "layers/1/mlp/experts/up_proj/kernel"
    array = grid_array(checkpoint, path)
    np.testing.assert_array_equal(array.materialize(), checkpoint.read(path))
    assert array.shape == (3, config.hidden_size, config.intermediate_size)
    assert 8 * (array.nbytes - array.lut.nbytes) / array.size == KEPT[kind]
    abstract = abstract_grid_array(checkpoint, path)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
        lambda a: (a.shape, a.dtype), array
    )


@pytest.mark.parametrize(
    ("arch", "family"), [("LLAMA", "mixtral"), ("QWEN3MOE", "qwen3_moe"), ("GPT_OSS", "gpt_oss")]
)
def test_names_of_experts_are_those_of_the_gguf_package(config, arch, family):
    config = dataclasses.replace(config, **FAMILIES_OF_EXPERTS[family])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_layers)
    for path in parameter_shapes(config):
        hf, ours = (checkpoint_name(path, f) for f in ("hf", "gguf"))
        if family == "mixtral" and "router" in path:
            hf = hf.replace("mlp.gate", "block_sparse_moe.gate")
        if family == "gpt_oss":
            hf, ours = (gpt_oss.checkpoint_name(name) for name in (hf, ours))
            hf = hf.replace(".sinks", ".sinks.weight")
        assert table.get_name(hf, try_suffixes=(".weight", ".bias")) == ours, path


def test_a_sentencepiece_tokenizer_is_read_beside_the_file(tmp_path, config):
    metadata = [
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.tokens", [*"abc", "<eos>"]),
        ("tokenizer.ggml.token_type", [1, 1, 1, 3]),
    ]
    write_gguf(tmp_path / "m.gguf", config, random_values(config), metadata=metadata)
    with pytest.raises(ValueError, match=r"m\.gguf has a tokenizer of kind 'llama'.*put the token"):
        load(tmp_path / "m.gguf")
    tiny_tokenizer(config.vocab_size).save(tmp_path)
    _, _, tokenizer = load(tmp_path / "m.gguf")
    assert tokenizer is not None
    assert tokenizer.encode("cab") == [2, 0, 1]
    metadata[1] = ("tokenizer.ggml.tokens", [*"axc", "<eos>"])
    write_gguf(tmp_path / "m.gguf", config, random_values(config), metadata=metadata)
    with pytest.raises(ValueError, match="another model's: its token 1 is 'b', not 'x'"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("pre", ["tekken", None])
def test_a_tokenizer_with_an_unknown_pre_tokenizer_is_read_beside_the_file(tmp_path, config, pre):
    config = dataclasses.replace(config, vocab_size=39)
    tiny = tiny_tokenizer(config.vocab_size)
    tokens = [tiny.backend.id_to_token(index) for index in range(config.vocab_size)]
    metadata = [
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.tokens", tokens),
        ("tokenizer.ggml.merges", ["c a"]),
        *([] if pre is None else [("tokenizer.ggml.pre", pre)]),
        ("tokenizer.chat_template", "of the file"),
    ]
    numbers = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5}
    values = random_values(config)
    write_gguf(tmp_path / "m.gguf", config, values, metadata=metadata, numbers=numbers)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    dataclasses.replace(tiny, chat_template=None, eos_token=None).save(tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    assert (tokenizer.encode("cab"), tokenizer.eos_ids) == ([2, 0, 1], (3, 5))
    assert (tokenizer.chat_template, tokenizer.eos_token) == ("of the file", tokens[3])
    dataclasses.replace(tiny, chat_template="beside it").save(tmp_path)
    assert load_tokenizer(checkpoint).chat_template == "beside it"


@pytest.mark.parametrize("family", GEMMA_IN_GGUF)
def test_names_of_gemma_are_those_of_the_gguf_package(config, family):
    config = dataclasses.replace(config, **FAMILIES_OF_GEMMA[family])
    arch = gguf.MODEL_ARCH[family.upper()]
    table = gguf.get_tensor_name_map(arch, config.num_layers)
    for path in parameter_shapes(config):
        hf, ours = (checkpoint_name(path, f, post_norms=config.post_norms) for f in ("hf", "gguf"))
        assert table.get_name(hf, try_suffixes=(".weight",)) == ours, path


def read_metadata(architecture, *, rope_factors=None, **fields):
    needed = {
        "embedding_length": 60,
        "feed_forward_length": 96,
        "block_count": 12,
        "attention.head_count": 4,
        "attention.key_length": 16,
    }
    metadata = {f"{architecture}.{key}": value for key, value in (needed | fields).items()}
    metadata["general.architecture"] = architecture
    return config_from_gguf(
        metadata, tied=True, vocab_size=8, rope_factors=rope_factors, source="a file"
    )


def test_gemma_metadata():
    second = read_metadata("gemma2")
    assert (second.attn_logit_softcapping, second.final_logit_softcapping) == (50.0, 30.0)
    assert (second.sliding_window, second.sliding_layers) == (4096, (True, False) * 6)
    assert second.query_pre_attn_scalar is None
    assert read_metadata("gemma2", block_count=46).query_pre_attn_scalar == 15
    third = read_metadata("gemma3", **{"rope.freq_base": 1e6, "attention.sliding_window": 512})
    assert (third.model_type, third.rope_theta, third.sliding_rope_theta) == (
        "gemma3_text",
        1e6,
        1e4,
    )
    assert third.sliding_layers == ((True,) * 5 + (False,)) * 2
    assert (third.attn_logit_softcapping, third.final_logit_softcapping) == (None, None)
    assert read_metadata("gemma3", block_count=62).query_pre_attn_scalar == 15
    assert read_metadata("gemma3").sliding_layers is None
    window = {"attention.sliding_window": 512, "rope.freq_base_swa": 2e4}
    pattern = "attention.sliding_window_pattern"
    fourth = read_metadata("gemma3", **window, **{pattern: 3})
    assert (fourth.sliding_layers, fourth.sliding_rope_theta) == ((True, True, False) * 4, 2e4)
    listed = read_metadata("gemma3", **window, **{pattern: [True] * 11 + [False]})
    assert listed.sliding_layers == (True,) * 11 + (False,)


TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, None),
        ({TYPE: "linear"}, None),
        ({TYPE: "linear", FACTOR: 4.0}, 4.0),
        ({FACTOR: 4.0}, 4.0),
        ({OLD_FACTOR: 4.0}, 4.0),
        ({FACTOR: 2.0, OLD_FACTOR: 4.0}, 2.0),
        ({FACTOR: 1.0}, None),
        ({FACTOR: 0.0}, None),
        ({TYPE: "none", FACTOR: 4.0}, None),
    ],
)
def test_linear_rope_scaling_is_what_llama_cpp_reads(fields, factor):
    expected = None if factor is None else RopeScaling("linear", factor=factor)
    assert read_metadata("llama", **fields).rope_scaling == expected
    factors = np.linspace(1, 8, 8)
    both = read_metadata("llama", rope_factors=factors, **fields).rope_scaling
    assert both == RopeScaling("factors", factors=tuple((factors * (factor or 1.0)).tolist()))


def test_yarn_is_what_llama_cpp_reads():
    fields = {TYPE: "yarn", FACTOR: 4.0, "rope.scaling.original_context_length": 64}
    scaling = read_metadata("llama", **fields).rope_scaling
    expected = RopeScaling("yarn", 4.0, 1.0, 32.0, 64, attention_factor=1 + 0.1 * np.log(4))
    assert scaling == expected
    betas = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
    scaling = read_metadata("llama", **fields, **betas).rope_scaling
    assert scaling == dataclasses.replace(expected, low_freq_factor=2.0, high_freq_factor=16.0)
    with pytest.raises(ValueError, match=r"a file: .* has a beta_slow that is not below"):
        read_metadata("llama", **fields, **{"rope.scaling.yarn_beta_slow": 40.0})
    with pytest.raises(ValueError, match=r"rope\.scaling\.attn_factor is not supported"):
        read_metadata("llama", **fields, **{"rope.scaling.attn_factor": 0.5})
    with pytest.raises(ValueError, match=r"type 'yarn' is not supported with rope_freqs\.weight"):
        read_metadata("llama", rope_factors=np.ones(8), **fields)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("attention.sliding_window", r"a file: 'attention\.sliding_window' is None"),
        ("expert_count", r"a file: 'expert_count' is None"),
    ],
)
def test_gpt_oss_without_what_it_needs(missing, message):
    fields = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}
    fields |= {"attention.sliding_window": 128}
    assert read_metadata("gpt-oss", **fields).sliding_layers == (True, False) * 6
    del fields[missing]
    with pytest.raises(ValueError, match=message):
        read_metadata("gpt-oss", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({TYPE: "longrope"}, r"rope\.scaling\.type 'longrope' is not supported"),
        ({FACTOR: -1.0}, r"a file: 'rope\.scaling\.factor' is -1\.0, not a positive number"),
        ({OLD_FACTOR: "4"}, r"a file: 'rope\.scale_linear' is '4', not a positive number"),
    ],
)
def test_rope_scaling_that_is_refused(fields, message):
    for factors in (None, np.ones(8)):
        with pytest.raises(ValueError, match=message):
            read_metadata("llama", rope_factors=factors, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.freq_base": 0.0}, r"a file: 'rope\.freq_base' is 0\.0, not a positive number"),
        ({"attention.head_count": 0}, r"a file: 'attention\.head_count' is 0, not an integer of"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count=8 leaves a part of each head of 16"),
        ({"attention.head_count_kv": [2] * 12}, r"a file: 'attention\.head_count_kv' is \[2"),
    ],
)
def test_numbers_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read_metadata("llama", **fields)


# Largest error relative to the largest of a block's values: half a step and the float16 step's own.
@pytest.mark.parametrize(
    ("kind", "error"),
    [(Q.F16, 1e-3), (Q.BF16, 1e-2), (Q.Q8_0, 0.01), (Q.Q5_1, 0.05), (Q.Q4_0, 0.15), (Q.Q4_1, 0.1)],
)
def test_types_are_dequantised(tmp_path, config, kind, error):
    values = random_values(config)
    write_gguf(tmp_path / "m.gguf", config, values, kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for path in ("layers/1/self_attn/k_proj/kernel", "layers/0/mlp/down_proj/kernel"):
        found = checkpoint.read(path)
        assert found.dtype == np.float32
        assert 0 < np.abs(found - values[path]).max() < error * np.abs(values[path]).max()


KEPT = {
    Q.Q4_0: 4.5,
    Q.Q4_1: 5.0,
    Q.Q5_0: 5.5,
    Q.Q5_1: 6.0,
    Q.Q8_0: 8.5,
    Q.Q2_K: 2.625,
    Q.Q3_K: 3.4375,
    Q.Q4_K: 4.5,
    Q.Q5_K: 5.5,
    Q.Q6_K: 6.5625,
    Q.IQ4_NL: 4.5,
    Q.IQ4_XS: 4.25,
    Q.MXFP4: 4.5,
    Q.NVFP4: 5.0,
    Q.TQ1_0: 2.0625,
    Q.TQ2_0: 2.0625,
    Q.Q1_0: 1.125,
}
"""Bits a weight as kept."""


@pytest.fixture(params=KEPT, ids=[kind.name for kind in KEPT])
def kept(request, tmp_path, config):
    """A checkpoint whose matrices are all of one type, and the type."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 1}
    config = dataclasses.replace(config, **sizes)
    write_gguf(tmp_path / "m.gguf", config, random_values(config), request.param)
    return open_checkpoint(tmp_path / "m.gguf"), request.param


def dequantized(checkpoint, path) -> np.ndarray:
    """A matrix `[out, in]` as the gguf package dequantises it, in the order of the file."""
    info = checkpoint.reader.infos[checkpoint.name(path)]
    data = read_bytes(info).reshape(info.shape[0], -1)
    if info.dtype == "Q1_0":  # which the package does not: float16 numbers, and their 128 signs
        blocks = data.reshape(-1, 18)
        signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
        dense = signs * blocks[:, :2].copy().view(np.float16).astype(np.float32)
    else:
        dense = gguf.dequantize(data, Q[info.dtype])
    return dense.reshape(info.shape)


@pytest.mark.parametrize(
    "path", ["layers/0/self_attn/q_proj/kernel", "layers/0/mlp/down_proj/kernel"]
)
def test_grids_are_exact(kept, path):
    checkpoint, kind = kept
    grid = checkpoint.read_grid(path)

    def repeated(scales):
        values = scales.values() if isinstance(scales, CodedScales) else scales
        return np.repeat(values, grid.group_size, axis=1)

    dense = grid.levels[grid.codes] * repeated(grid.scales)
    if grid.offsets is not None:
        dense = dense + repeated(grid.offsets)
    stored = permuted(dense, checkpoint.config.num_heads) if "q_proj" in path else dense
    np.testing.assert_array_equal(stored, dequantized(checkpoint, path))
    np.testing.assert_array_equal(grid.dense(), dense)
    np.testing.assert_array_equal(checkpoint.read(path), dense.T)
    assert (grid.offsets is not None) == (kind in (Q.Q4_1, Q.Q5_1, Q.Q2_K, Q.Q4_K, Q.Q5_K))
    assert len(np.unique(grid.codes)) > grid.levels.size / 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_factors_beside_weights_become_part_of_their_tables(tmp_path, config, family):
    experts = family == "qwen3_moe"
    changes = FAMILIES_OF_EXPERTS[family] if experts else {}
    config = dataclasses.replace(config, intermediate_size=128, **changes)
    stem = "blk.0.ffn_up_exps" if experts else "blk.0.ffn_up"
    path = f"layers/0/mlp/{'experts/' if experts else ''}up_proj/kernel"
    factors = np.array([0.3, 2, 5] if experts else [0.3], np.float32)
    values = random_values(config)
    write_gguf(tmp_path / "plain.gguf", config, values, Q.NVFP4)
    extra = [(f"{stem}.scale", factors), (f"{stem}.input_scale", np.ones(1, np.float32))]
    write_gguf(tmp_path / "m.gguf", config, values, Q.NVFP4, extra=extra)
    plain, found = (
        open_checkpoint(tmp_path / f"{name}.gguf").read(path) for name in ("plain", "m")
    )
    expected = plain * (factors[:, None, None] if experts else factors)
    np.testing.assert_allclose(found, expected, rtol=2.0**-22)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    np.testing.assert_array_equal(grid_array(checkpoint, path).materialize(), found)
    assert jax.eval_shape(lambda: grid_array(checkpoint, path)) == abstract_grid_array(
        checkpoint, path
    )
    wrong = [(f"{stem}.scale", np.ones(7, np.float32))]
    write_gguf(tmp_path / "wrong.gguf", config, values, Q.NVFP4, extra=wrong)
    with pytest.raises(ValueError, match=r"\.scale' of type F32 and shape \[7\] must be of F32"):
        open_checkpoint(tmp_path / "wrong.gguf")


def test_grids_become_exact_arrays(kept):
    checkpoint, kind = kept
    path = "layers/0/mlp/down_proj/kernel"
    array, dense = grid_array(checkpoint, path), checkpoint.read(path)
    np.testing.assert_array_equal(array.materialize(), dense)
    assert jax.eval_shape(lambda: grid_array(checkpoint, path)) == abstract_grid_array(
        checkpoint, path
    )
    table = array.lut.nbytes
    assert 8 * (array.nbytes - table) / dense.size == KEPT[kind]
    x = np.random.default_rng(3).normal(size=(3, 512)).astype(np.float32)
    products = np.abs(x) @ np.abs(dense)
    # float32 sums of 512 products, in another order.
    assert (np.abs(jnp.asarray(x) @ array - x @ dense) <= 1e-5 * products).all()


def test_a_kept_decoder_computes_what_the_dense_one_does(kept, tmp_path):
    checkpoint, _ = kept
    params = load_params(checkpoint, keep_quantized=True)
    lutjax.save(tmp_path / "saved", params)
    assert_same_bits(lutjax.io.read_params(tmp_path / "saved"), params)
    packed = lutjax.prepack(lutjax.fuse_projections(params))
    gate_up = packed["layers"]["0"]["mlp"]["gate_up_proj"]["kernel"]
    assert isinstance(gate_up, LutArray) and gate_up.shape == (256, 1024)
    run = jax.jit(lutjax.lift(Decoder(checkpoint.config).apply))
    tokens = jnp.arange(5)[None]
    logits, expected = (
        run({"params": p}, tokens) for p in (packed, load_params(checkpoint, keep_quantized=False))
    )
    # float32 sums of up to 512 terms in other orders, through one layer.
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_other_types_have_no_grid(tmp_path, config):
    write_gguf(tmp_path / "m.gguf", config, random_values(config), Q.F16)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    path = "layers/0/mlp/up_proj/kernel"
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight'.*of type F16 is not stored as"):
        checkpoint.read_grid(path)
    with pytest.raises(ValueError, match=r"mlp/up_proj/kernel is not stored as codes"):
        abstract_grid_array(checkpoint, path)
    with pytest.raises(ValueError, match=r"keep_quantized.*no matrix of the GGUF types.*Q6_K"):
        load_params(checkpoint, keep_quantized=True)


def test_scales_that_are_not_finite_are_named(tmp_path, config):
    values = random_values(config)
    write_gguf(tmp_path / "m.gguf", config, values, Q.Q4_0)
    info = open_checkpoint(tmp_path / "m.gguf").reader.infos["blk.1.ffn_up.weight"]
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[info.offset : info.offset + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    path = "layers/1/mlp/up_proj/kernel"
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight'.*not finite"):
        grid_array(open_checkpoint(tmp_path / "m.gguf"), path)
    grid = open_checkpoint(tmp_path / "m.gguf", allow_nonfinite=True).read_grid(path)
    assert np.isinf(grid.scales).sum() == 1


def test_rope_factors_come_from_their_tensor(tmp_path, config):
    factors = np.linspace(1, 8, 8).astype(np.float32)
    extra = [("rope_freqs.weight", factors)]
    write_gguf(tmp_path / "m.gguf", config, random_values(config), extra=extra)
    scaling = open_checkpoint(tmp_path / "m.gguf").config.rope_scaling
    assert scaling == RopeScaling("factors", factors=tuple(map(float, factors)))


def test_nan_is_named(tmp_path, config):
    values = random_values(config)
    values["layers/1/mlp/up_proj/kernel"][2, 3] = np.nan
    write_gguf(tmp_path / "m.gguf", config, values)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight.*holds 1 NaN"):
        list(checkpoint.parameters())


def test_missing_and_misshapen_tensors(tmp_path, config):
    values = random_values(config)
    removed = values.pop("layers/1/mlp/up_proj/kernel")
    write_gguf(tmp_path / "a.gguf", config, values)
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        open_checkpoint(tmp_path / "a.gguf")
    values["layers/1/mlp/up_proj/kernel"] = removed.T
    write_gguf(tmp_path / "b.gguf", config, values)
    with pytest.raises(ValueError, match=r"ffn_up\.weight' has shape \[64, 96\].*\[96, 64\]"):
        open_checkpoint(tmp_path / "b.gguf")


def test_a_part_of_a_split_file(tmp_path, config):
    values = random_values(config)
    write_gguf(tmp_path / "m.gguf", config, values, numbers={"split.count": 2})
    with pytest.raises(ValueError, match=r"m\.gguf is one of 2 parts.*llama-gguf-split --merge"):
        open_checkpoint(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", config, values, numbers={"split.count": 1})
    assert open_checkpoint(tmp_path / "m.gguf").config == config


def test_unknown_architecture(tmp_path, config):
    odd = dataclasses.replace(config, model_type="mamba")
    write_gguf(tmp_path / "m.gguf", odd, random_values(config))
    with pytest.raises(ValueError, match="'mamba'; supported are llama, mistral, mixtral, qwen2"):
        open_checkpoint(tmp_path / "m.gguf")


def test_type_that_cannot_be_dequantised(tmp_path, config):
    extra = [("blk.0.odd", np.arange(4, dtype=np.int32))]
    write_gguf(tmp_path / "m.gguf", config, random_values(config), extra=extra)
    with pytest.raises(ValueError, match=r"'blk\.0\.odd' has the type I32"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.fixture
def sound(tmp_path, config) -> bytes:
    write_gguf(tmp_path / "sound.gguf", config, random_values(config))
    return (tmp_path / "sound.gguf").read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 10, 23, 24, 40, 500, 3000, -1])
def test_truncated_anywhere(tmp_path, sound, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound[:keep])
    with pytest.raises(ValueError, match=r"cut\.gguf"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 2**60), "1152921504606846976 tensors"),
        (16, struct.pack("<Q", 2**60), "1152921504606846976 metadata keys"),
        (24, struct.pack("<Q", 2**62), "truncated"),  # length of the first key
    ],
)
def test_absurd_sizes(tmp_path, sound, offset, value, message):
    path = tmp_path / "absurd.gguf"
    path.write_bytes(sound[:offset] + value + sound[offset + len(value) :])
    with pytest.raises(ValueError, match=rf"absurd\.gguf.*{message}"):
        open_checkpoint(path)


def test_the_demo_model_keeps_its_grid(smollm2):
    """The 4-bit matrices of the demo model are affine grids, its embedding an 8-bit one."""
    checkpoint = open_checkpoint(smollm2.path)
    grid = checkpoint.read_grid("layers/3/self_attn/k_proj/kernel")
    assert grid.codes.max() == 15
    assert grid.scales.shape == (192, 18)
    dense = grid.levels[grid.codes] * np.repeat(grid.scales, 32, axis=1)
    dense += np.repeat(grid.offsets, 32, axis=1)
    kernel = smollm2.params["layers"]["3"]["self_attn"]["k_proj"]["kernel"]
    np.testing.assert_array_equal(dense.T, np.asarray(kernel))
    assert jax.tree.reduce(lambda n, leaf: n + leaf.size, smollm2.params, 0) == 134_515_008
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(smollm2.params))
