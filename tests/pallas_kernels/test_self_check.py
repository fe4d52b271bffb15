"""The checks of kernels on the machine that is there: right kernels pass, wrong ones do not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native, platforms
from pallas_kernels.lut_matmul import interpret_kernels, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.lut_matmul.dispatch import LUT_MATMUL
from pallas_kernels.self_check import CHECKS, GROUP, LONG_CHECKS, SPARSE_CHECKS, Check, SparseCheck
from pallas_kernels.sparse_matmul import masked

WITH_A_LAYOUT = [
    Check(4, 16, k=130, spaced=True),
    Check(8, 3, k=64, columns=True, spaced=True),
    Check(3, 2, "float32", k=96, transpose=True),
    Check(4, 2, k=64, weights=3),
    Check(4, 3, k=130, spaced=True, offsets=True),
    Check(4, 2, k=64, per_column=True),
]


def test_names_of_checks_tell_them_apart():
    for checks in (CHECKS + LONG_CHECKS, SPARSE_CHECKS):
        assert len({str(check) for check in checks}) == len(checks)
    assert str(Check(8, 5, transpose=True)) == "8 bits, 5 rows of x, bfloat16, transposed"


@pytest.mark.parametrize("name", ["xla", "cpu_native"])
def test_every_check_has_an_outcome_on_this_machine(name):
    if name == "cpu_native" and native.availability() is not None:
        pytest.skip(str(native.availability()))
    outcomes = {str(check): check.run(name) for check in CHECKS}
    assert {o.status for o in outcomes.values()} == {"ok", "refused"}, outcomes
    refused = [check for check, outcome in outcomes.items() if outcome.status == "refused"]
    assert all("weights" in check for check in refused), refused


def test_long_checks_use_memory_of_accelerators_again():
    """A pipeline as long as its memory would also be right if it never waited for a free slot."""
    few, many, tpu = set(), set(), set()
    for check in LONG_CHECKS:
        words = jax.ShapeDtypeStruct((-(-check.k // 8), check.bits, check.n), jnp.uint8)
        static = {"k": check.k, "group_size": check.group, "transpose": check.transpose}
        problem = mosaic_gpu.make_problem(check.m, words, **static, tiles=check.weights)
        if isinstance(problem.config, mosaic_gpu.Config):
            few.add((check.bits, check.group, problem.steps_of_block > problem.config.stages))
        else:
            many.add((check.bits, check.transpose, problem.steps > problem.config.stages))
        x = jax.ShapeDtypeStruct((check.m, check.n if check.transpose else check.k), jnp.bfloat16)
        lut = jax.ShapeDtypeStruct((1, 2**check.bits, 1), jnp.float32)
        on_tpu = mosaic_tpu.make_problem(x, words, lut, **static, device_kind="TPU v6 lite")
        tpu.add((check.transpose, on_tpu.k_tiles > 1))
    assert {(bits, GROUP, True) for bits in (2, 3, 4, 8)} <= few
    assert {(4, group, True) for group in (16, 32, 64)} <= few
    assert {(4, False, True), (3, False, True), (4, True, True), (3, True, True)} <= many
    assert {(False, True), (True, True)} <= tpu


def test_sizes_of_checks_are_those_of_the_product():
    check = Check(3, 2, k=2048, n=640, group=64)
    assert str(check) == "3 bits, 2 rows of x, bfloat16, 2048 x 640, groups of 64"
    assert check.run("reference").status == "ok"


@pytest.mark.parametrize("check", SPARSE_CHECKS, ids=str)
def test_sparse_products_are_right_here(check):
    assert check.run("masked").status == check.run(None).status == "ok"


@pytest.mark.parametrize("check", WITH_A_LAYOUT, ids=str)
def test_a_layout_is_checked_in_interpret_mode(check):
    with interpret_kernels():
        assert check.run("mosaic_tpu").status == "ok"
    elsewhere = check.run("mosaic_tpu")
    assert elsewhere.status == "refused" and "a kernel for tpu" in elsewhere.result


def test_a_wrong_kernel_fails(monkeypatch):
    right = reference.lut_matmul
    check, identity = Check(4, 2, "float32", k=64), Check(4, 64, identity=True)

    def with_bits_off(*arrays, **static):  # an ulp or so of a bfloat16
        return right(*arrays, **static) * jnp.asarray(1.01, arrays[0].dtype)

    monkeypatch.setattr(reference, "lut_matmul", with_bits_off)
    outcome = check.run("reference")
    assert outcome.status == "FAILED" and outcome.result == pytest.approx(0.01, rel=1e-3)
    assert outcome.describe(check.limit) == "relative error 0.01, at most 1e-05 is right"
    assert identity.run("reference").describe(0) == "other bits than the dense weight"


@pytest.mark.parametrize("part", ["offsets", "tables"])
def test_a_kernel_that_forgets_something_fails(monkeypatch, part):
    right = reference.lut_matmul

    def forgets(x, words, scales, lut, offsets=None, **static):
        return right(x, words, scales, lut[:1], None if part == "offsets" else offsets, **static)

    monkeypatch.setattr(reference, "lut_matmul", forgets)
    wrong = [c for c in CHECKS if (c.offsets if part == "offsets" else c.per_column)]
    # Of another size than in other tests, as traces of products are kept.
    wrong = [dataclasses.replace(c, k=200) for c in wrong if not (c.columns or c.spaced)]
    outcomes = [check.run("reference").status for check in wrong]
    assert outcomes and set(outcomes) == {"FAILED"}


def test_a_kernel_that_does_not_compile_fails(monkeypatch):
    def cannot_be_lowered(*_, **__):
        raise NotImplementedError("unimplemented primitive in Pallas TPU lowering")

    monkeypatch.setattr(reference, "lut_matmul", cannot_be_lowered)
    assert Check(4, 3, k=72).run("reference").describe(1.0).endswith("Pallas TPU lowering")
    assert Check(4, 3, k=72).run("reference").status == "FAILED"
    monkeypatch.setattr(masked, "sparse_matmul", cannot_be_lowered)
    assert SparseCheck(2).run("masked").status == "FAILED"


def test_runs_that_differ_and_errors_are_failures(monkeypatch):
    check = Check(4, 2, "float32", k=72)
    counter = iter(range(9))

    def drifting(x, words, *rest, **static):
        return jnp.full((x.shape[0], words.shape[-1]), next(counter), x.dtype)

    monkeypatch.setattr("pallas_kernels.self_check.lut_matmul", drifting)
    assert check.run("reference") == dataclasses.replace(
        check.run("reference"), status="FAILED", result="two runs differ"
    )

    def broken(*_, **__):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr("pallas_kernels.self_check.lut_matmul", broken)
    assert check.run("reference").describe(1.0) == "RuntimeError: the device is on fire"


def test_thresholds_are_part_of_the_oracle():
    check = SparseCheck(1, bits=4, dtype="float32")
    assert check.run("reference").result < 1e-6
    dense_error = 0.1  # what forgetting to ignore anything would cost, at the least
    rng = np.random.default_rng(0)
    x = rng.standard_normal(384)
    ignored = np.where(np.abs(x) > 0.7, 0, x)
    assert np.linalg.norm(ignored) / np.linalg.norm(x) > dense_error > check.limit


class TestDisabledKernels:
    def best(self):
        x = jnp.ones((1, 64))
        words = jnp.zeros((8, 4, 32), jnp.uint8)
        arrays = (x, words, jnp.ones((1, 32)), jnp.ones((1, 16, 1)), None)
        static = {"k": 64, "group_size": 64, "transpose": False}
        return LUT_MATMUL.best_here(arrays, static)

    @pytest.mark.skipif(native.availability() is not None, reason=str(native.availability()))
    def test_none_goes_on_without_them(self, monkeypatch):
        assert self.best() == "cpu_native"
        monkeypatch.setenv(platforms.DISABLED, " cpu_native,mosaic_tpu ")
        assert self.best() == "xla"
        assert Check(4, 1, k=64).run("cpu_native").status == "ok"  # by its name it still runs

    def test_what_is_no_kernel_is_refused(self, monkeypatch):
        monkeypatch.setenv(platforms.DISABLED, "xla,cpu_native")
        with pytest.raises(ValueError, match=r"PALLAS_KERNELS_DISABLE names xla; it takes cpu_n"):
            self.best()
