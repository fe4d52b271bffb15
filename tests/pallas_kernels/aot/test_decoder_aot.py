"""A decoder as `lutjax generate` runs it: four kernels a block and the head; no weight moves."""

import dataclasses
import math
import re

import compilers
import jax
import jax.numpy as jnp
import pytest

import lutjax
from lutjax import LutConfig, Recipe, Rule
from lutjax.models import Decoder, DecoderConfig, init_cache

S = jax.ShapeDtypeStruct
BATCH = 16
FOUR_BITS = LutConfig(bits=4, group_size=128)
RECIPE = Recipe((Rule("*", FOUR_BITS),))
SHAPE_OF_LLAMA_3_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    tie_embeddings=False,
    dtype=jnp.bfloat16,
)


def parameters(model, tokens, implementation, kind):
    dense = model.init(jax.random.key(0), tokens)["params"]
    dense = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dense)
    # A tied embedding is looked up too.
    head = LutConfig(8, 128, "int") if model.config.tie_embeddings else FOUR_BITS
    recipe = dataclasses.replace(RECIPE, embeddings=head)
    params = lutjax.quantize(lutjax.fuse_projections(dense), recipe)
    return lutjax.prepack(params, implementation=implementation, device_kind=kind)


@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
@pytest.mark.parametrize("tied", [False, True])
def test_one_token_takes_four_kernels_a_block(target, implementation, call, tied):
    (compilers.need_tpu if target == "v6e" else compilers.need_gpu)()
    config = dataclasses.replace(SHAPE_OF_LLAMA_3_8B, tie_embeddings=tied)
    model = Decoder(config)
    tokens = S((BATCH, 1), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, BATCH, 256, jnp.bfloat16))
    kind = None if target == "h200" else compilers.KIND[target]
    with compilers.abstract(target):
        params = jax.eval_shape(lambda t: parameters(model, t, implementation, kind), tokens)
    apply = lutjax.lift(model.apply, strict=True)

    def step(params, tokens, cache):
        logits, cache = apply({"params": params}, tokens, cache=cache)
        return jnp.argmax(logits[:, -1], axis=-1), cache

    compiled, _ = compilers.compile_for(target, step, params, tokens, cache)
    program = compiled.as_text()
    assert program.count(f'custom_call_target="{call}') == 4 * config.num_layers + 1
    # Lookups in the embedding read the words of BATCH columns; what is large stays where it is, or
    # is brought near whole (by copies and slices that are done later, then a bitcast).
    arrays = re.findall(r"= [us]32\[([\d,]+)\]\S* ([\w-]+)\((.*)", program)
    large = {
        "bitcast" if "ConcatBitcast" in rest else op
        for dims, op, rest in arrays
        if math.prod(map(int, dims.split(","))) > 2**21
    }
    assert "parameter" in large
    assert large <= {"parameter", "get-tuple-element", "bitcast", "copy-done", "slice-done"}
    # No dense matrix either: the temporary memory is that of the logits, once or twice.
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2.1 * BATCH * config.vocab_size * 4
