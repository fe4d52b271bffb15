"""Tuned configurations are found by shape and rows, merged, and otherwise absent."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import platforms, tune
from pallas_kernels.lut_matmul import mosaic_gpu, mosaic_gpu_tile, tuning


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_TUNING", str(tmp_path))
    yield tmp_path
    tuning._entries.cache_clear()


def entry(m, stages):
    config = {"warpgroups": 2, "stages": stages, "tiles": 1}
    return {"bits": 4, "m": m, "k": 512, "n": 256, "config": config, "microseconds": 1.0}


def test_an_entry_serves_its_shape_and_the_rows_up_to_its_own(folder):
    path = tuning.save("mosaic_gpu", "NVIDIA H200", [entry(16, 3), entry(64, 2)])
    assert path == folder / "nvidia-h200.json"

    def find(**change):
        product = {"bits": 4, "m": 10, "k": 512, "n": 256, **change}
        return tuning.lookup("mosaic_gpu", "NVIDIA H200", **product)

    assert find()["stages"] == 3
    assert find(m=17)["stages"] == 2
    assert find(m=65) is None and find(k=1024) is None and find(bits=3) is None
    assert tuning.lookup("mosaic_gpu", "NVIDIA H100", bits=4, m=1, k=512, n=256) is None
    tuning.save("mosaic_gpu", "NVIDIA H200", [entry(16, 4)])
    assert find()["stages"] == 4 and find(m=64)["stages"] == 2


def test_the_kernel_takes_the_tuned_configuration(folder):
    tile = {"rows": 104, "tiles": 1, "stages": 3, "splits": 2, "cluster": 2}
    tuning.save("mosaic_gpu", "NVIDIA H200", [entry(16, 3), {**entry(128, 1), "config": tile}])
    words = jax.ShapeDtypeStruct((64, 4, 256), "uint8")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        problem = mosaic_gpu.make_problem(8, words, k=512, group_size=128)
        other = mosaic_gpu.make_problem(32, words, k=512, group_size=128)
        many = mosaic_gpu.make_problem(100, words, k=512, group_size=128)
    assert problem.config.stages == 3 and problem.config.warpgroups == 2
    assert many.config == mosaic_gpu_tile.Config(104, 1, 3, splits=2)
    assert other.config == mosaic_gpu.default_config(32, 4, n=256, k=512, group=128)


@pytest.mark.parametrize("m", [1, 16, 64, 512])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_candidates_fit_shared_memory_and_divide_the_rows(m, bits):
    found = mosaic_gpu.candidates(m, bits, k=4096, n=4096, group_size=128)
    assert len(found) > 3 and len(set(found)) == len(found)
    for config in found[1:]:
        if isinstance(config, mosaic_gpu_tile.Config):
            assert mosaic_gpu_tile._fits(bits, config, 128)
            assert 4096 % (mosaic_gpu.SLICE_K * config.splits) == 0
        else:
            assert mosaic_gpu._fits(m, bits, config, 128)
            assert 4096 % config.block_k == 0  # the last block of columns may be cut


def test_a_candidate_needs_no_parts():
    words = jax.ShapeDtypeStruct((512, 4, 28672), "uint8")
    first, whole = mosaic_gpu.candidates(16, 4, k=4096, n=28672, group_size=128)[:2]
    parts = [
        len(mosaic_gpu.make_problem(16, words, k=4096, group_size=128, config=config).parts())
        for config in (first, whole)
    ]
    assert parts == [2, 1] and whole.blocks == 112
    uneven = mosaic_gpu.candidates(16, 4, k=16384, n=34048, group_size=128)
    assert all(config.blocks == uneven[0].blocks for config in uneven)


@pytest.mark.parametrize(
    "kind,count",
    [
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H200", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H20", 78),
        ("NVIDIA H20-3e", 78),
        (None, 132),
    ],
)
def test_a_persistent_block_for_every_multiprocessor(kind, count, monkeypatch):
    monkeypatch.setattr(platforms, "device_kind", lambda platform: kind)
    config = mosaic_gpu.default_config(16, 4, n=28672, k=4096, group=128)
    assert config.blocks == count


def test_the_tuner_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    assert tune.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 384, 640, 1024, 4096])
def test_a_step_holds_whole_groups_or_a_group_whole_steps(group_size):
    words = jax.ShapeDtypeStruct((512, 4, 256), "uint8")
    problem = mosaic_gpu.make_problem(1, words, k=4096, group_size=group_size)
    sizes = problem.group, problem.config.block_k
    assert max(sizes) % min(sizes) == 0
    assert problem.padded_k >= 4096
    assert problem.padded_k % problem.config.block_k == 0


@pytest.mark.parametrize("group_size", [64, 384, 768, 5000])
@pytest.mark.parametrize("m", [1, 16, 64, 130, 4096])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_packed_once_serve_any_number_of_rows(bits, m, group_size):
    words = jax.ShapeDtypeStruct((625, bits, 300), "uint8")
    packed = mosaic_gpu.make_problem(16, words, k=5000, group_size=group_size)
    sizes = packed.padded_k, packed.padded_n
    problem = mosaic_gpu.make_problem(m, words, k=5000, group_size=group_size, padded=sizes)
    config = problem.config
    assert (problem.padded_k, problem.padded_n) == sizes
    if m > 64:
        assert sizes[0] == mosaic_gpu.SLICE_K * config.splits * problem.steps
        assert mosaic_gpu_tile._fits(bits, config, group_size)
        return
    assert sizes[0] % config.block_k == 0 and sizes[1] % config.block_n == 0
    assert mosaic_gpu._fits(m, bits, config, group_size)


@pytest.mark.parametrize("n,k", [(4096, 4096), (28672, 4096), (128, 14336), (256, 128)])
def test_every_step_is_in_one_part_that_counts(n, k):
    words = jax.ShapeDtypeStruct((k // 8, 4, n), "uint8")
    problem = mosaic_gpu.make_problem(1, words, k=k, group_size=128)
    share, parts = problem.steps_of_block, problem.parts()
    written = np.zeros_like(parts)
    for step in range(problem.all_steps):
        block, column = step // share, step // problem.steps
        written[block - column * problem.steps // share, column] = True
    np.testing.assert_array_equal(written, parts)


@pytest.mark.parametrize("m", [1, 16, 512])
@pytest.mark.parametrize("group_size", [64, 128, 384, 5000])
def test_transposed_blocks_hold_whole_groups_or_groups_whole_blocks(m, group_size):
    words = jax.ShapeDtypeStruct((625, 4, 300), "uint8")
    problem = mosaic_gpu.make_problem(m, words, k=5000, group_size=group_size, transpose=True)
    assert (problem.contracted, problem.columns) == (384, 5120)
    sizes = problem.group, problem.span
    assert max(sizes) % min(sizes) == 0


def test_more_rows_and_columns_never_cost_less():
    def best(m, columns):
        sizes = {"columns": columns, "contracted": 4096}
        found = mosaic_gpu_tile.candidates(m, 4, group=128, transpose=False, **sizes)
        return mosaic_gpu_tile.clocks(m, 4, found[0], **sizes)

    assert best(128, 4096) <= best(512, 4096) <= best(512, 8192) <= best(4096, 8192)


@pytest.mark.parametrize(
    ("k", "n", "group", "tiles"),
    [(2048, 768, 128, 22), (2048, 768, 128, 48), (2048, 1536, 128, 24), (2880, 5760, 32, 4)],
)
def test_tiles_share_the_multiprocessors(k, n, group, tiles):
    words = jax.ShapeDtypeStruct((k // 8, 4, n), np.uint8)
    problem = mosaic_gpu.make_problem(
        8,
        words,
        k=k,
        group_size=group,
        padded=(-(-k // 128) * 128, -(-n // 128) * 128),
        tiles=tiles,
    )
    config = problem.config
    blocks = tiles * -(-problem.all_steps // problem.steps_of_block)
    codes = -(-blocks // 132) * problem.steps_of_block * config.block_k * config.block_n
    even = problem.padded_k * problem.padded_n * tiles / 132
    assert codes <= 1.4 * even


@pytest.mark.parametrize("k", [576, 1100, 4096])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_heuristic_pads_no_more_rows_than_a_slice_has(k, bits):
    config = mosaic_gpu.default_config(4, bits, n=1536, k=k, group=64)
    assert -(-k // 128) % config.slices == 0
