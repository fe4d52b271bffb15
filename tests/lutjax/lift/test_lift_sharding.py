"""Sharded weights: eight virtual devices, and two processes, each in processes of their own."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lift_checks import weight

import lutjax
from lutjax.arrays import ReorderedArray
from lutjax.arrays.sharding import part_specs
from tests.virtual_devices import environment

HERE = Path(__file__).parent


def start(devices, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=HERE,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_eight_devices():
    process = start(8, "sharded_programs.py")
    out, _ = process.communicate(timeout=540)
    assert process.returncode == 0, out
    assert out.count("PASSED") == 14


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [start(4, "two_processes.py", port, str(i)) for i in range(2)]
    try:
        outs = [process.communicate(timeout=540)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("PASSED" in out for out in outs), outs


SIZES = {"model": 4, "data": 2}


@pytest.mark.parametrize(
    ("make", "spec", "words", "scales"),
    [
        (lambda: weight(128, 48), P(None, "model"), P(None, None, "model"), P(None, "model")),
        (lambda: weight(128, 48), P("model"), P("model", None, None), P("model", None)),
        (lambda: weight(128, 48), P("model", "data"), P("model", None, "data"), P("model", "data")),
        # Groups of 64 lie across shards of 32 rows: every device keeps all scales.
        (lambda: weight(128, 48, group_size=64), P("model"), P("model", None, None), P(None, None)),
        (lambda: weight(48, 128, axis=1), P("model"), P(None, None, "model"), P(None, "model")),
        (lambda: weight(3, 128, 48), P(None, None, "model"), P(None, None, None, "model"),
         P(None, None, "model")),
        (lambda: weight(8, 128, 48), P("model"), P("model", None, None, None),
         P("model", None, None)),
        (lambda: weight(64, 4, 8, axis=0), P(None, "model"), P(None, None, "model"),
         P(None, "model")),
        (lambda: weight(4, 32, 64, axis=(0, 1)), P("model"), P("model", None, None),
         P("model", None)),
        (lambda: weight(128, 48), P(None, ("data", "model")), P(None, None, ("data", "model")),
         P(None, ("data", "model"))),
    ],
)  # fmt: skip
def test_specs_of_the_parts(make, spec, words, scales):
    specs = part_specs(make(), spec, SIZES)
    assert specs.words == words and specs.scales == scales
    assert specs.lut == P(*words[:-3], None, None, None)


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (lambda: weight(48, 32), P("model"), "K=48 rows do not split into 4 whole blocks of 8"),
        (lambda: weight(64, 50), P(None, "model"), "N=50 columns do not split into 4"),
        (lambda: weight(64, 4, 8, axis=0), P(None, None, "model"), "shard axis 1 instead"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_names_the_parameter(make, spec, message):
    mesh = jax.sharding.AbstractMesh((4,), ("model",))
    params = {"mlp": {"kernel": make()}}
    with pytest.raises(ValueError, match=rf"mlp/kernel LutArray.*{message}"):
        lutjax.shardings_like(params, {"mlp": {"kernel": NamedSharding(mesh, spec)}})


def test_other_parts_follow():
    base = weight(128, 48)
    low_rank = lutjax.LowRankArray.of(jnp.ones((128, 2)), jnp.ones((2, 48)))
    specs = part_specs(lutjax.SumArray.of(base, low_rank), P("data", "model"), SIZES)
    assert specs.parts[1].left == P("data", None) and specs.parts[1].right == P(None, "model")
    assert specs.parts[0].words == P("data", None, "model")


def test_rotated_weights_are_split_in_whole_blocks():
    def rotated(block):
        return lutjax.quantize(jnp.ones((256, 48)), lutjax.Recipe.higgs(group_size=block))

    specs = part_specs(rotated(64), P("model", "data"), SIZES)
    assert specs.base.words == P("model", None, "data")
    assert specs.base.scales == P("model", "data")
    assert part_specs(rotated(128), P(None, "model"), SIZES).base.words == P(None, None, "model")
    with pytest.raises(ValueError, match="K=256 rows do not split into 4 times whole rotated"):
        part_specs(rotated(128), P("model"), SIZES)


def test_reordered_weights_are_split_by_columns():
    base = lutjax.quantize(jnp.ones((256, 48)), group_size=64)
    array = ReorderedArray.of(base, jnp.arange(256))
    specs = part_specs(array, P(None, "model"), SIZES)
    assert (specs.base.words, specs.order) == (P(None, None, "model"), P(None))
    with pytest.raises(ValueError, match="reordered over all of K, which does not split; shard N"):
        part_specs(array, P("model"), SIZES)


def test_dense_leaves_and_other_shardings():
    params = {"kernel": weight(128, 48), "bias": jnp.zeros(48)}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = lutjax.shardings_like(params, {"kernel": one, "bias": one})
    assert set(jax.tree.leaves(shardings)) == {one}
    moved = jax.device_put(params, shardings)
    assert moved["kernel"].words.sharding == one


def test_quantised_scales_that_a_shard_cuts_through_are_an_error():
    double = lutjax.DoubleQuant(block=16)
    w = lutjax.quantize(jnp.ones((32, 64)), bits=4, group_size=16, double_quant=double)
    specs = part_specs(w, P(None, "model"), SIZES)
    assert specs.scales.words == P(None, None, "model")
    assert specs.scales.steps == P(None, "model")
    coarse = lutjax.quantize(
        jnp.ones((32, 64)), bits=4, group_size=16, double_quant=lutjax.DoubleQuant(block=64)
    )
    assert part_specs(coarse, P(None, "model"), SIZES).scales.steps == P(None, None)
    local = lutjax.arrays.QuantizedScales(
        words=coarse.scales.words[..., :16], steps=jnp.ones((2, 4)), floor=coarse.scales.floor,
        padding=6, block=(1, 16),
    )  # fmt: skip
    with pytest.raises(ValueError, match="shards must be whole blocks"):
        local.expand()
