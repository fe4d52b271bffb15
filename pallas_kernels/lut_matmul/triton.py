"""The lookup-table product through Triton itself: NVIDIA GPUs from Ampere on, any table.

jax-triton (the extra ``gpu``) compiles the kernels of :mod:`triton_kernel` and puts them into the
program. This is for GPUs without a kernel of their own here, and for the time after jax's own
Triton lowering.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platforms
from pallas_kernels.layout import BLOCK
from pallas_kernels.lut_matmul import triton_kernel, triton_ptx
from pallas_kernels.lut_matmul.epilogue import add_offsets
from pallas_kernels.manual_axes import vary_over, varying_axes

# Compute capability by a part of the device's name, for compilation without the device.
_CAPABILITY = {"A100": 80, "A10G": 86, "L4": 89, "RTX 4090": 89, "H100": 90, "H200": 90}
_PROGRAMS = 256  # to aim for: about two for each multiprocessor of a large GPU


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two), parts that the contraction is split into, and Triton's own."""

    block_m: int
    block_k: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


def supports(
    x: Any,
    words: Any,
    scales: Any,
    lut: Any,
    offsets: Any = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
) -> str | None:
    """None if the kernel can run here, else the reason why not."""
    del words, scales, lut, offsets, k, group_size, transpose
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"activations of {x.dtype}; use bfloat16, float16 or float32"
    if platforms.interpreting():
        return "jax-triton has no interpret mode; use 'pallas_triton' for numbers on a CPU"
    kind = platforms.device_kind("cuda")
    if kind is None:
        return "no GPU is compiled for here"
    try:
        import jax_triton  # noqa: F401
    except Exception as error:  # it uses private names of jax and triton
        return (
            f"jax-triton cannot be imported ({type(error).__name__}: {error}); the extra is 'gpu'"
        )
    capability = _capability(kind)
    if capability is None:
        return f"the compute capability of {kind!r} is unknown; known are {', '.join(_CAPABILITY)}"
    if capability < 80:
        return f"{kind} has compute capability {capability / 10}; the kernel needs 8.0 (Ampere)"
    return None


def _capability(kind: str) -> int | None:
    device = jax.devices()[0]
    if device.device_kind == kind and hasattr(device, "compute_capability"):
        try:
            return round(10 * float(device.compute_capability))
        except ValueError:  # other makers name theirs
            return None
    found = [number for name, number in _CAPABILITY.items() if name in kind]
    return found[0] if found else None


def default_config(
    m: int, k: int, n: int, *, group_size: int, wide: bool, transpose: bool
) -> Config:
    """A sane configuration; ``wide`` is for float32 activations."""
    block_m = min(64, max(16, 1 << (m - 1).bit_length()))
    block_k = 64 if wide or transpose or m > 16 else 128
    if group_size < k:  # tiles within a group take its scale on their sums
        within = math.gcd(group_size, block_k)
        block_k = within if within >= 32 else min(block_k, 64)
    block_n = 64 if wide or transpose else 128
    tiles, steps = (k, block_k), (n, block_n)
    if not transpose:
        tiles, steps = steps, tiles
    programs = math.ceil(tiles[0] / tiles[1]) * math.ceil(m / block_m)
    splits = min(math.ceil(steps[0] / steps[1]), max(1, _PROGRAMS // programs))
    return Config(block_m, block_k, block_n, splits, 4, 3)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its constants, and what it reads and writes."""

    kernel: Any
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    config: Config
    operands: tuple[jax.Array, ...]
    out_shape: tuple[int, int, int]
    order: np.ndarray

    def result(self, y: jax.Array, k: int) -> jax.Array:
        """The product, ``float32[M, N]`` or ``[M, K]``, from what the kernel wrote."""
        y = y.sum(axis=0)
        if self.kernel is triton_kernel.transposed:
            blocks = y.reshape(y.shape[0], -1, BLOCK)
            y = blocks[..., np.argsort(self.order)].reshape(y.shape)[:, :k]
        return y


def prepare(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
    config: Config | None = None,
    permute: bool | None = None,
) -> Launch:
    """The launch of a product; ``permute`` False loads entries where they could be permuted."""
    blocks, bits, n = words.shape
    tables, _, p = lut.shape
    m, padded_k, wide = x.shape[0], blocks * BLOCK * p, x.dtype == jnp.float32
    if permute is None:
        one_table = tables == 1 and p == 1 and bits in triton_ptx.WORDS
        permute = one_table and not wide and (group_size % BLOCK == 0 or scales.shape[0] == 1)
    order = np.array(triton_ptx.ORDER[bits] if permute else range(BLOCK))
    if not transpose:
        x = jnp.pad(x, ((0, 0), (0, padded_k - k)))
        x = x.reshape(m, -1, BLOCK)[..., order].reshape(m, padded_k)
    config = config or default_config(
        m, k, n, group_size=group_size, wide=wide, transpose=transpose
    )
    outer, inner = (n, config.block_n), (padded_k, config.block_k)
    if transpose:
        outer, inner = inner, outer
    steps = math.ceil(inner[0] / (inner[1] * config.splits))
    splits = math.ceil(inner[0] / (inner[1] * steps))
    constants = {
        "K": padded_k,
        "N": n,
        "BITS": bits,
        "P": p,
        "TABLES": tables,
        "GROUP": group_size,
        "GROUPS": scales.shape[0],
        "PERMUTE": permute,
        "STEPS": steps,
        "PRECISION": "ieee" if wide else "tf32",
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
    }
    return Launch(
        kernel=triton_kernel.transposed if transpose else triton_kernel.forward,
        grid=(math.ceil(outer[0] / outer[1]), math.ceil(m / config.block_m), splits),
        constants=constants,
        config=config,
        operands=(x, words, scales, _planes(lut, x.dtype) if permute else lut.astype(jnp.float32)),
        out_shape=(splits, m, outer[0]),
        order=order,
    )


def _planes(lut: jax.Array, dtype: Any) -> jax.Array:
    """A table as ``int32[2**bits / 2]``: the low bytes of its entries, then the high ones."""
    entries = jax.lax.bitcast_convert_type(lut[0, :, 0].astype(dtype), jnp.uint8)  # [entries, 2]
    return jax.lax.bitcast_convert_type(entries.T.reshape(-1, 4), jnp.int32)


def lut_matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    lut: jax.Array,
    offsets: jax.Array | None = None,
    *,
    k: int,
    group_size: int,
    transpose: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """The product for ``x`` of shape ``[M, K]``, or ``[M, N]`` when transposed."""
    static: dict[str, Any] = {"k": k, "group_size": group_size, "transpose": transpose}

    @jax.custom_batching.custom_vmap
    def product(x, words, scales, lut):
        launch = prepare(x, words, scales, lut, **static, config=config)
        return launch.result(_call(launch), k)

    @product.def_vmap
    def rule(axis_size, in_batched, *arrays):  # jax-triton has no batching rule
        def one(i):
            return product(
                *(a[i] if batched else a for a, batched in zip(arrays, in_batched, strict=True))
            )

        return jax.lax.map(one, jnp.arange(axis_size)), True

    y = product(x, words, scales, lut)
    return add_offsets(y, x, offsets, **static).astype(x.dtype)


def _call(launch: Launch) -> jax.Array:
    import jax_triton

    kind = platforms.device_kind("cuda")
    assert kind is not None
    x = launch.operands[0]
    y = jax_triton.triton_call(
        *launch.operands,
        kernel=launch.kernel,
        out_shape=jax.ShapeDtypeStruct(launch.out_shape, jnp.float32),
        grid=launch.grid,
        name="lut_matmul",
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
        compute_capability=_capability(kind),
        M=x.shape[0],
        **launch.constants,
    )
    return vary_over(y, varying_axes(x))
