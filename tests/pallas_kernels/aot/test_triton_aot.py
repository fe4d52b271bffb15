"""The Triton kernels: numbers in Triton's interpreter, code by its compiler. Nothing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import compilers
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.lut_matmul import lut_matmul
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.operation import Operation

K = N = 4096
TOLERANCE = {"bfloat16": 1.1e-2, "float16": 2e-3, "float32": 1e-5}
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "uint8": "*u8"}


def test_numbers_in_the_interpreter():
    compilers.need_triton()
    program = Path(__file__).with_name("triton_interpreter.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) > 40
    wrong = [r for r in results if not (r["error"] <= TOLERANCE[r["dtype"]] and r["same"])]
    assert not wrong


def arguments(m, bits, group, dtype=jnp.bfloat16, *, transpose=False, p=1, tables=1):
    return (
        jnp.zeros((m, N if transpose else K), dtype),
        jnp.zeros((K // 8 // p, bits, N), jnp.uint8),
        jnp.zeros((K // group, N), jnp.bfloat16),
        jnp.zeros((tables, 2**bits, p), jnp.float32),
    )


def compiled(capability, m=16, bits=4, group=128, config=None, **kind):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.lut_matmul import triton as implementation

    launch = implementation.prepare(
        *arguments(m, bits, group, **kind),
        k=K,
        group_size=group,
        transpose=kind.get("transpose", False),
        config=config,
    )
    types = [TYPES.get(str(a.dtype), "*i32") for a in launch.operands]
    constants = {**launch.constants, "M": m}
    names = launch.kernel.arg_names
    signature = dict(zip(names, [*types, "*fp32"], strict=False))
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(
        launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    config = launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = compilers.DUMP  # jax-triton empties it when it is imported
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = f"{compilers.DUMP}/triton.ptx"
    Path(path).write_text(kernel.asm["ptx"])
    suffix = "a" if capability >= 90 else ""
    return compilers.Sass(path, arch=f"sm_{capability}{suffix}"), config


# Measured with Triton 3.6 and ptxas 13.5: 4 bits 5.91 (sm_80), 5.98 (sm_89), 6.05 (sm_90); 3 and 2
# bits 4.60 and 3.81 (sm_80). Loading entries from the first-level cache, as Pallas' Triton lowering
# has to, takes 11.5.
INSTRUCTIONS = {(80, 4): 6.2, (80, 3): 4.9, (80, 2): 4.1, (89, 4): 6.2, (90, 4): 6.3}


@pytest.mark.parametrize("capability,bits", INSTRUCTIONS)
def test_instructions_per_code(capability, bits):
    compilers.need_triton()
    from pallas_kernels.lut_matmul.triton import Config

    config = Config(16, 128, 128, splits=1, num_warps=4, num_stages=3)  # a loop, not unrolled
    code, _ = compiled(capability, bits=bits, config=config)
    codes_a_thread = config.block_k * config.block_n / (32 * config.num_warps)
    assert code.spills == 0
    assert code.main_loop("HMMA").total() / codes_a_thread <= INSTRUCTIONS[capability, bits]


@pytest.mark.parametrize(
    "kind",
    [
        {"m": 512, "group": 64},
        {"transpose": True, "bits": 3},
        {"dtype": jnp.float32},
        {"dtype": jnp.float16, "bits": 8, "group": 32},
        {"p": 2, "tables": N, "m": 64},
    ],
    ids=["prefill", "transposed", "float32", "8bits", "vectors"],
)
def test_kernels_compile_without_spills(kind):
    compilers.need_triton()
    assert compiled(80, **kind)[0].spills == 0


def test_a_kernel_with_too_large_a_tile_spills():
    compilers.need_triton()
    from pallas_kernels.lut_matmul.triton import Config

    code, _ = compiled(80, m=64, config=Config(64, 64, 128, 1, 1, 2))
    assert code.spills > 0


def test_a_tile_that_is_no_power_of_two_does_not_compile():
    compilers.need_triton()
    from pallas_kernels.lut_matmul.triton import Config

    with pytest.raises(Exception, match="power of 2"):
        compiled(80, config=Config(16, 96, 128, 1, 4, 3))


@pytest.mark.parametrize("kind,number", [("NVIDIA A100-SXM4-80GB", 80), ("NVIDIA H200", 90)])
def test_the_public_function_lowers_through_jax_triton(kind, number):
    compilers.need_triton()
    arrays = jax.eval_shape(lambda: arguments(3, 4, 64))
    with compilers.abstract_device(kind):
        text = str(
            jax.make_jaxpr(lambda *a: lut_matmul(*a, k=K, group_size=64, implementation="triton"))(
                *arrays
            )
        )
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), arrays)
        experts = jax.vmap(lambda *a: lut_matmul(*a, k=K, group_size=64, implementation="triton"))
        lowered = jax.jit(experts).trace(*stacked).lower(lowering_platforms=("cuda",))
    assert f"compute_capability={number}" in text
    assert "triton_kernel_call" in lowered.as_text()


@pytest.mark.parametrize(
    "installed,rows,best",
    [
        (True, 16, "triton"),
        (True, 511, "triton"),
        (True, 512, "xla"),
        (False, 31, "pallas_triton"),
        (False, 32, "xla"),
    ],
)
def test_a_gpu_takes_what_is_fastest_for_so_many_rows(installed, rows, best, monkeypatch):
    compilers.need_triton()
    if not installed:
        load = LUT_MATMUL.backend
        without = lambda _, name: "no jax-triton" if name == "triton" else load(name)  # noqa: E731
        monkeypatch.setattr(Operation, "backend", without)
    _, *weight = jax.eval_shape(lambda: arguments(3, 4, 64))
    x = jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)
    with compilers.abstract_device("NVIDIA H200"):
        static = {"k": K, "group_size": 64, "transpose": False}
        assert LUT_MATMUL.best_here((x, *weight, None), static) == best


def test_an_unknown_device_is_refused():
    compilers.need_triton()
    with (
        compilers.abstract_device("NVIDIA Unknown"),
        pytest.raises(NotImplementedError, match="capability of 'NVIDIA Unknown' is unknown"),
    ):
        lut_matmul(*arguments(3, 4, 64), k=K, group_size=64, implementation="triton")
