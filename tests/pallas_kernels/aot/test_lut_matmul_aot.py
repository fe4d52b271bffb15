"""The lookup kernels for TPUs compile within bounds on their bundles, the Triton one for an H200.

Nothing runs here: "compiles", never "runs" or "fast".
"""

from __future__ import annotations

import compilers
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.lut_matmul import lut_matmul, mosaic_tpu

S = jax.ShapeDtypeStruct
K = N = 4096


def shapes(m, bits, group, dtype=jnp.bfloat16, *, transpose=False, per_channel=False):
    return (
        S((m, N if transpose else K), dtype),
        S((K // 8, bits, N), jnp.uint8),
        S((K // group, N), jnp.float32),
        S((N if per_channel else 1, 2**bits, 1), jnp.float32),
    )


# Target, bits, and whether entries are equally spaced, and so computed. Measured with libtpu
# 0.0.42.1: v6e 0.73 0.92 0.75, tpu7x 0.74 0.92 0.72, v5e 1.39 1.51 0.76; computed, from 8 bits on:
# v6e 0.53 0.62 0.64 0.58, tpu7x 0.57 0.57, v5e 0.96 1.00.
BUNDLES = {
    ("v6e", 4, False): 0.78,
    ("v6e", 3, False): 0.98,
    ("v6e", 2, False): 0.80,
    ("tpu7x", 4, False): 0.80,
    ("v5e", 4, False): 1.5,
    ("v5e", 3, False): 1.6,
    ("v5e", 2, False): 0.85,
    ("v6e", 8, True): 0.57,
    ("v6e", 4, True): 0.66,
    ("v6e", 3, True): 0.69,
    ("v6e", 2, True): 0.63,
    ("tpu7x", 8, True): 0.62,
    ("tpu7x", 4, True): 0.62,
    ("v5e", 8, True): 1.05,
    ("v5e", 4, True): 1.08,
}


def tpu_product(target, *, m=16, bits=4, group=128, computed=False, **kind):
    """The kernel on prepacked operands, their shapes, and the codes of a tile."""
    x, words, scales, lut = shapes(m, bits, group, **kind)
    transpose = kind.get("transpose", False)
    with compilers.abstract(target):
        static = {"k": K, "group_size": group, "transpose": transpose, "computed": computed}
        problem = mosaic_tpu.make_problem(x, words, lut, **static)
        packed = jax.eval_shape(
            lambda w, s, t: mosaic_tpu.prepack(w, s, t, problem=problem), words, scales, lut
        )
    tile = problem.config.block_k * problem.config.block_n
    return lambda x, p: mosaic_tpu.apply(x, p, problem, k=K, n=N), (x, packed), tile


@pytest.mark.parametrize("target,bits,computed", BUNDLES, ids=lambda v: str(v))
def test_tpu_bundles_per_1024_codes(target, bits, computed):
    compilers.need_tpu()
    function, operands, codes = tpu_product(target, bits=bits, computed=computed)
    count = compilers.bundles(target, function, *operands)
    assert count / (codes / 1024) <= BUNDLES[target, bits, computed]


@pytest.mark.parametrize("target", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    "kind",
    [
        {"transpose": True},
        {"per_channel": True},
        {"dtype": jnp.float32},
        {"m": 512, "group": 64},
        {"bits": 8},
        {"bits": 8, "computed": True, "transpose": True},
        {"bits": 8, "computed": True, "dtype": jnp.float32},
    ],
    ids=["transposed", "channel", "float32", "prefill", "8bits", "bytes-transposed", "bytes-f32"],
)
def test_tpu_kernels_compile(target, kind):
    compilers.need_tpu()
    function, operands, _ = tpu_product(target, **kind)
    compiled, _ = compilers.compile_for(target, function, *operands)
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()


def product_at(target, m, k, n, *, bits=4, group=64, transpose=False, tables=1):
    """A product of canonical words, compiled through the public function."""
    compilers.need_tpu()
    compiled, _ = compilers.compile_for(
        target,
        lambda *a: lut_matmul(
            *a, k=k, group_size=group, transpose=transpose, implementation="mosaic_tpu"
        ),
        S((m, n if transpose else k), jnp.bfloat16),
        S((-(-k // 8), bits, n), jnp.uint8),
        S((-(-k // group), n), jnp.float32),
        S((tables, 2**bits, 1), jnp.float32),
    )
    return compiled.as_text()


def test_tpu_kernel_compiles_through_the_public_function():
    text = product_at("v6e", 16, 1000, 500, bits=3)
    assert 'custom_call_target="tpu_custom_call"' in text


# Down projections of Llama 2 7B and 13B, Qwen2.5 7B and 1.5B, and gpt-oss: sizes of which the
# tiles that waste the least are no whole lanes, which blocks of activations must be.
@pytest.mark.parametrize(
    ("k", "bits", "group"),
    [(11008, 4, 64), (13824, 8, 64), (18944, 4, 64), (8960, 4, 64), (2880, 4, 32), (11008, 3, 96)],
)
@pytest.mark.parametrize(("m", "transpose"), [(1, False), (512, False), (16, True)])
def test_tpu_tiles_are_whole_lanes(k, bits, group, m, transpose):
    text = product_at("v6e", m, k, 1024, bits=bits, group=group, transpose=transpose)
    assert 'custom_call_target="tpu_custom_call"' in text


def test_tables_of_columns_are_refused_on_tpu_v4():
    assert 'custom_call_target="tpu_custom_call"' in product_at("v4", 16, 1024, 256)
    with pytest.raises(NotImplementedError, match="TPU v4, which cannot gather sublanes"):
        product_at("v4", 16, 1024, 256, tables=256)


@pytest.mark.parametrize("transpose", [False, True])
def test_triton_kernel_compiles(transpose):
    compilers.need_gpu()
    compiled, _ = compilers.compile_for(
        "h200",
        lambda *a: lut_matmul(
            *a, k=K, group_size=64, transpose=transpose, implementation="pallas_triton"
        ),
        *shapes(16, 3, 64, transpose=transpose),
    )
    assert 'custom_call_target="__gpu$xla.gpu.triton"' in compiled.as_text()


def test_a_broken_tpu_kernel_does_not_compile():
    compilers.need_tpu()

    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.take(x_ref[0], x_ref[...].astype(jnp.int32), axis=0)

    with pytest.raises(Exception, match=r"(?i)unsupported|not implemented|only 2d|gather"):
        compilers.compile_for(
            "v5e",
            pl.pallas_call(kernel, out_shape=S((8, 128), jnp.float32)),
            S((8, 128), jnp.float32),
        )
