from __future__ import annotations

import jax
import pytest

from lutjax.cli.main import main
from pallas_kernels import lut_matmul, native, self_check, sparse_matmul
from pallas_kernels.native import loader


def lines(capsys) -> dict[str, str]:
    """First words of every line of `lutjax doctor`, and what follows them."""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    return dict(line.strip().partition(" ")[::2] for line in out.splitlines())


def test_every_implementation_is_listed_with_its_reason(capsys):
    said = lines(capsys)
    for name in {*lut_matmul.IMPLEMENTATIONS, *sparse_matmul.IMPLEMENTATIONS}:
        assert name in said
    assert "runs here" in said["reference"] and "runs here" in said["masked"]
    assert "no: " in said["mosaic_tpu"] or "runs here" in said["mosaic_tpu"]


@pytest.mark.skipif(native.availability() is not None, reason=str(native.availability()))
def test_the_library_and_its_instruction_set(capsys):
    said = lines(capsys)
    assert said["C++"] == f"kernels: {native.library_path()}"
    assert native.instruction_sets()[0] in said["instruction"]
    assert "runs here, the default" in said["cpu_native"]


def test_why_there_is_no_library(capsys, monkeypatch):
    monkeypatch.setattr(loader, "_load", lambda: (None, None, "no compiler; install one"))
    said = lines(capsys)
    assert said["C++"].endswith("no compiler; install one")
    assert said["cpu_native"].strip() == "no: no compiler"


def test_a_jax_that_cannot_start_is_reported(capsys, monkeypatch):
    def devices():
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "devices", devices)
    said = lines(capsys)
    assert said["lutjax"] and said["cores:"]
    assert said["devices:"] == "none, jax cannot start: RuntimeError: no such platform"


def test_every_kernel_that_products_use_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(self_check, "CHECKS", self_check.CHECKS[:2])
    monkeypatch.setattr(self_check, "SPARSE_CHECKS", self_check.SPARSE_CHECKS[:4])
    assert main(["doctor", "--check"]) == 0
    checked = capsys.readouterr().out.split("products compared with float64:")[1]
    assert "lut_matmul xla: 2 of 2 right\n" in checked
    if jax.default_backend() == "cpu":  # it takes one row, and no codes
        assert "sparse_matmul xla: 2 of 2 right (2 refused)" in checked
        assert "mosaic" not in checked and "triton" not in checked
    monkeypatch.setenv("PALLAS_KERNELS_DISABLE", "cpu_native")
    monkeypatch.setattr(self_check, "SPARSE_CHECKS", self_check.SPARSE_CHECKS[3:])
    assert main(["doctor", "--check"]) == 0
    checked = capsys.readouterr().out.split("products compared with float64:")[1]
    assert "cpu_native" not in checked and "sparse_matmul xla" not in checked
