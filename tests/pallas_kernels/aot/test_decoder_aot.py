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
from lutjax.arrays import LutArray
from lutjax.models import MODELS, Decoder, init_cache

S = jax.ShapeDtypeStruct
BATCH = 16
FOUR_BITS = LutConfig(bits=4, group_size=128)
INTEGERS = LutConfig(8, 128, "int")
RECIPE = Recipe((Rule("*", FOUR_BITS),))
SHAPE_OF_LLAMA_3_8B = dataclasses.replace(MODELS["llama-3-8b"], num_layers=2, dtype=jnp.bfloat16)


def quantized(model, tokens):
    dense = model.init(jax.random.key(0), tokens)["params"]
    dense = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dense)
    # A tied embedding is looked up too.
    head = INTEGERS if model.config.tie_embeddings else FOUR_BITS
    recipe = dataclasses.replace(RECIPE, embeddings=head)
    return lutjax.quantize(lutjax.fuse_projections(dense), recipe)


def with_tables(array):
    """The array with the values of its table, as `prepack` knows them outside `jit`."""
    if not isinstance(array, LutArray):
        return array
    config = INTEGERS if array.bits == 8 else FOUR_BITS
    return dataclasses.replace(array, lut=jnp.asarray(config.table()).reshape(array.lut.shape))


def prepacked(params, implementation, kind):
    """Shapes of the parameters that users run."""
    params = jax.tree.map(with_tables, params, is_leaf=lambda a: isinstance(a, LutArray))
    leaves, treedef = jax.tree.flatten(params)
    shapes = [leaf for leaf in leaves if isinstance(leaf, S)]

    def pack(arrays):
        arrays = iter(arrays)
        filled = [next(arrays) if isinstance(leaf, S) else leaf for leaf in leaves]
        params = treedef.unflatten(filled)
        return lutjax.prepack(params, implementation=implementation, device_kind=kind)

    return jax.eval_shape(pack, shapes)


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
        params = jax.eval_shape(lambda t: quantized(model, t), tokens)
        params = prepacked(params, implementation, kind)
    if tied and target == "v6e":
        assert params["embed_tokens"]["embedding"].packed.layout.lookup == "int8"
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
