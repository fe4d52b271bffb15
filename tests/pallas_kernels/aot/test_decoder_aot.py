"""A decoder as `lutjax generate` runs it: four kernels a block and the head; no weight moves."""

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
RECIPE = Recipe((Rule("lm_head/kernel", FOUR_BITS), Rule("*", FOUR_BITS)))
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
    params = lutjax.quantize(lutjax.fuse_projections(dense), RECIPE)
    return lutjax.prepack(params, implementation=implementation, device_kind=kind)


@pytest.mark.parametrize(
    ("target", "implementation", "call"),
    [("v6e", "mosaic_tpu", "tpu_custom_call"), ("h200", "mosaic_gpu", "mosaic_gpu")],
)
def test_one_token_takes_four_kernels_a_block(target, implementation, call):
    (compilers.need_tpu if target == "v6e" else compilers.need_gpu)()
    config = SHAPE_OF_LLAMA_3_8B
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
    words = r"= [us]32\[\d+,\d+,\d+[\d,]*\]\S* ([\w-]+)\("
    assert set(re.findall(words, program)) <= {"parameter", "bitcast", "copy-done"}
    # No dense matrix either: the temporary memory is that of the logits, once or twice.
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 2.1 * BATCH * config.vocab_size * 4
