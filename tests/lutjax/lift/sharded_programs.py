"""Programs on eight virtual devices; run as a process of its own by ``test_lift_sharding.py``.

``python sharded_programs.py NAME``, in the environment of ``tests/virtual_devices.py``, runs one of
PROGRAMS and fails loudly.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lutjax
from lutjax.arrays import LowRankArray
from lutjax.models import Decoder, DecoderConfig, init_cache
from pallas_kernels.lut_matmul import interpret_kernels

WIDTH, HIDDEN = 128, 256


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params(dtype="float32", **options):
    """A tensor-parallel MLP: the first kernel by columns, the second by rows."""
    dense = {
        "up": {"kernel": normal(0, WIDTH, HIDDEN) / WIDTH**0.5},
        "down": {"kernel": normal(1, HIDDEN, WIDTH) / HIDDEN**0.5},
    }
    params = lutjax.quantize(dense, bits=4, group_size=16, **options)
    return jax.tree.map(lambda a: a.astype(dtype), params, is_leaf=lutjax.is_compressed)


def mlp(params, x):
    return x + jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


SPECS = {"up": {"kernel": P(None, "model")}, "down": {"kernel": P("model", None)}}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def place(params, mesh):
    dense = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    return jax.device_put(params, lutjax.shardings_like(params, dense))


def collectives(text):
    """The lines of a compiled program that gather bytes (codes are the only uint8 arrays)."""
    names = ("all-gather", "all-to-all", "collective-permute")
    lines = [line for line in text.splitlines() if any(f" {name}" in line for name in names)]
    return [line for line in lines if "u8[" in line]


def gspmd():
    """Automatic axes: equal to one device, and no codes move."""
    params, x = make_params(), normal(2, 16, WIDTH)
    mesh = mesh_of(AxisType.Auto)
    sharded = place(params, mesh)
    assert sharded["up"]["kernel"].words.addressable_shards[0].data.shape[-1] == HIDDEN // 4
    assert sharded["down"]["kernel"].words.addressable_shards[0].data.shape[0] == HIDDEN // 8 // 4
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))

    def loss(p, x):
        return jnp.sum(lutjax.lift(mlp, strict=True)(p, x) ** 2)

    for fn in (lutjax.lift(mlp, strict=True), jax.grad(loss, argnums=1)):
        expected = jax.jit(fn)(params, jax.device_get(x))
        compiled = jax.jit(fn).lower(sharded, x).compile()
        moved = collectives(compiled.as_text())
        assert not moved, moved
        # float32, another order of sums
        np.testing.assert_allclose(compiled(sharded, x), expected, rtol=2e-5, atol=2e-5)


def unconstrained():
    """A constraint that leaves an axis to the compiler says nothing about a weight's parts."""
    params, x = make_params(), normal(2, 16, WIDTH)
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("model", P.UNCONSTRAINED))

    def fn(params, x):
        return x @ jax.lax.with_sharding_constraint(params["up"]["kernel"], sharding)

    y = jax.jit(lutjax.lift(fn, strict=True))(params, x)
    np.testing.assert_allclose(y, x @ params["up"]["kernel"].materialize(), rtol=2e-5, atol=2e-5)


def manual_outside():
    """Lift within shard_map: each device multiplies with its shard."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        manual_on(mesh_of(kind))


def manual_on(mesh):
    params, x = make_params(), normal(2, 16, WIDTH)
    dense = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    shardings = lutjax.shardings_like(params, dense)
    specs = jax.tree.map(lambda s: s.spec, shardings)

    def local(params, x):
        def part(params, x):
            hidden = jnp.tanh(x @ params["up"]["kernel"])
            return jax.lax.psum(hidden @ params["down"]["kernel"], "model")

        return x + lutjax.lift(part, strict=True)(params, x)

    mapped = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(specs, P("data", None)), out_specs=P("data", None)
        )
    )
    sharded = jax.device_put(params, shardings)
    x = jax.device_put(np.asarray(x), NamedSharding(mesh, P("data", None)))
    expected = mlp(lutjax.materialize(params), jax.device_get(x))
    np.testing.assert_allclose(mapped(sharded, x), expected, rtol=2e-5, atol=2e-5)
    assert not collectives(mapped.lower(sharded, x).compile().as_text())

    def dense_total(x):
        return jnp.sum(mlp(lutjax.materialize(params), x) ** 2)

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(mapped(sharded, x) ** 2)))(x)
    expected = jax.grad(dense_total)(jax.device_get(x))
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-4)


def manual_inside():
    """shard_map within the lifted function."""
    params, x = make_params(), normal(2, 16, WIDTH)
    mesh = mesh_of(AxisType.Auto)

    def local(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"])
        return x + jax.lax.psum(hidden @ params["down"]["kernel"], "model")

    def fn(params, x):
        return jax.shard_map(
            local, mesh=mesh, in_specs=(SPECS, P("data", None)), out_specs=P("data", None)
        )(params, x)

    sharded, expected = place(params, mesh), mlp(lutjax.materialize(params), x)
    lifted = jax.jit(lutjax.lift(fn, strict=True))
    np.testing.assert_allclose(lifted(sharded, x), expected, rtol=2e-5, atol=2e-5)
    assert not collectives(lifted.lower(sharded, x).compile().as_text())
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(lutjax.lift(fn, strict=True)(sharded, x) ** 2)))
    dense = jax.grad(lambda x: jnp.sum(mlp(lutjax.materialize(params), x) ** 2))
    np.testing.assert_allclose(gradient(x), dense(x), rtol=2e-5, atol=1e-4)


def explicit():
    """Explicit axes without shard_map: JAX's types say how the result is sharded."""
    params, x = make_params(), normal(2, 16, WIDTH)
    mesh = mesh_of(AxisType.Explicit)
    expected = mlp(lutjax.materialize(params), x)
    with jax.set_mesh(mesh):
        sharded = place(params, mesh)
        dense = sharded["up"]["kernel"].materialize()
        assert dense.sharding.spec == SPECS["up"]["kernel"], dense.sharding
        np.testing.assert_array_equal(dense, params["up"]["kernel"].materialize())
        x = jax.device_put(x, NamedSharding(mesh, P("data", None)))

        def fn(params, x):
            hidden = jnp.tanh(x @ params["up"]["kernel"])
            assert jax.typeof(hidden).sharding.spec == P("data", "model")
            down = jnp.einsum(
                "bk,kn->bn", hidden, params["down"]["kernel"], out_sharding=P("data", None)
            )
            return x + down

        y = jax.jit(lutjax.lift(fn, strict=True))(sharded, x)
        assert y.sharding.spec == P("data", None), y.sharding
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


def adapters():
    """Data-parallel training of adapters on a base that is sharded by columns and rows."""
    params, x = make_params(), normal(2, 16, WIDTH)
    mesh = mesh_of(AxisType.Auto)

    def with_adapter(base, seed):
        rows, columns = base.shape
        low_rank = LowRankArray.of(normal(seed, rows, 2), normal(seed + 1, 2, columns))
        return lutjax.SumArray.of(base, low_rank)

    both = jax.tree.map(lambda w: with_adapter(w, 7), params, is_leaf=lutjax.is_compressed)
    learns, frozen = lutjax.partition(both)

    @jax.jit
    def gradients(learns, frozen, x):
        def loss(p):
            return jnp.mean(lutjax.lift(mlp, strict=True)(lutjax.combine(p, frozen), x) ** 2)

        return jax.grad(loss)(learns)

    expected = gradients(learns, frozen, x)
    sharded = lutjax.partition(place(both, mesh))
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
    actual = gradients(*sharded, x)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
    assert not collectives(gradients.lower(*sharded, x).compile().as_text())


def prepacked():
    """Weights that every device packs for itself: equal to one device, and no codes move."""
    params, x = make_params(), normal(2, 16, WIDTH)
    mesh = mesh_of(AxisType.Auto)
    dense = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    packed = lutjax.prepack(place(params, mesh), implementation="xla")
    up, down = packed["up"]["kernel"], packed["down"]["kernel"]
    assert (up.shards, down.shards) == ((1, 4), (4, 1))
    assert (up.shape, down.shape) == ((WIDTH, HIDDEN), (HIDDEN, WIDTH))
    specs = jax.tree.map(lambda s: s.spec, lutjax.shardings_like(packed, dense))
    expected = mlp(lutjax.materialize(params), x)

    def local(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"])
        return x + jax.lax.psum(hidden @ params["down"]["kernel"], "model")

    def split(fn, specs):
        rows = P("data", None)
        return jax.shard_map(fn, mesh=mesh, in_specs=(specs, rows), out_specs=rows)

    outside = jax.jit(split(lutjax.lift(local, strict=True), specs))
    inside = jax.jit(lutjax.lift(split(local, SPECS), strict=True))
    for run in (outside, inside):
        np.testing.assert_allclose(run(packed, x), expected, rtol=2e-5, atol=2e-5)
        assert not collectives(run.lower(packed, x).compile().as_text())
    explicit_mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(explicit_mesh):
        packed = lutjax.prepack(place(params, explicit_mesh), implementation="xla")
        rows = NamedSharding(explicit_mesh, P("data", None))
        run = jax.shard_map(
            local, mesh=explicit_mesh, in_specs=(SPECS, rows.spec), out_specs=rows.spec
        )
        found = jax.jit(lutjax.lift(run, strict=True))(packed, jax.device_put(x, rows))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert refusal(lambda: x @ up).endswith("or run the canonical parameters")
    by_rows = {"kernel": NamedSharding(mesh, P("model", None))}
    assert "1 x 4 shards" in refusal(lambda: lutjax.shardings_like({"kernel": up}, by_rows))


def prepacked_with_quantised_scales():
    """Whose codes and blocks shards would cut through: eight groups, and 64 columns."""
    params, x = make_params(double_quant=lutjax.DoubleQuant(block=64)), normal(2, 16, WIDTH)
    expected = mlp(lutjax.materialize(params), x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            packed = lutjax.prepack(place(params, mesh), implementation="xla")
            assert packed["down"]["kernel"].shards == (4, 1)

            def local(params, x):
                hidden = jnp.tanh(x @ params["up"]["kernel"])
                return x + jax.lax.psum(hidden @ params["down"]["kernel"], "model")

            rows = NamedSharding(mesh, P("data", None))
            run = jax.shard_map(local, mesh=mesh, in_specs=(SPECS, rows.spec), out_specs=rows.spec)
            found = jax.jit(lutjax.lift(run, strict=True))(packed, jax.device_put(x, rows))
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def prepacked_for_tpus():
    """The same in the layout of a kernel, which is interpreted."""
    params, x = make_params("bfloat16"), normal(2, 16, WIDTH).astype(jnp.bfloat16)
    mesh = mesh_of(AxisType.Auto)
    with interpret_kernels():
        packed = lutjax.prepack(place(params, mesh), device_kind="TPU v6 lite")
        dense = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        specs = jax.tree.map(lambda s: s.spec, lutjax.shardings_like(packed, dense))

        def local(params, x):
            hidden = jnp.tanh(x @ params["up"]["kernel"])
            return jax.lax.psum(hidden @ params["down"]["kernel"], "model")

        rows = P("data", None)
        run = jax.shard_map(
            lutjax.lift(local, strict=True),
            mesh=mesh,
            in_specs=(specs, rows),
            out_specs=rows,
            check_vma=False,  # the interpreter slices by numbers that vary over no axis
        )
        found = jax.jit(run)(packed, x).astype(jnp.float32)
    dense = lutjax.materialize(make_params())
    expected = mlp(dense, x.astype(jnp.float32)) - x.astype(jnp.float32)
    assert jnp.linalg.norm(found - expected) < 2e-2 * jnp.linalg.norm(expected)


def misplaced():
    """Codes that are split and scales that are not."""
    mesh = mesh_of(AxisType.Auto)
    params = lutjax.quantize({"kernel": normal(0, 128, 64)}, bits=4, group_size=16)
    placed = jax.device_put(params, NamedSharding(mesh, P()))
    words = NamedSharding(mesh, P(None, None, "model"))
    kernel = placed["kernel"]
    kernel = dataclasses.replace(kernel, words=jax.device_put(kernel.words, words))
    message = refusal(lambda: lutjax.prepack({"kernel": kernel}, implementation="xla"))
    assert "place it with lutjax.shardings_like" in message, message


def rings():
    """A decoding step whose batch is split writes to rings without moving anything."""
    config = DecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    model, mesh = Decoder(config), mesh_of(AxisType.Auto)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    cache = init_cache(config, 2, 16)
    shardings = jax.tree.map(lambda a: rows if a.ndim else whole, cache)
    for time in (1, 3):
        tokens = jnp.ones((2, time), jnp.int32)
        step = jax.jit(
            lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache),
            in_shardings=(whole, rows, shardings),
            out_shardings=(rows, shardings),
        )
        text = step.lower(params, tokens, cache).compile().as_text()
        assert not [line for line in text.splitlines() if " all-" in line or " collective-" in line]


def prepacked_experts():
    """Experts that are split by columns, and experts over devices."""
    dense = normal(0, 8, WIDTH, HIDDEN)
    params = lutjax.quantize({"kernel": dense}, bits=4, group_size=16)
    mesh = mesh_of(AxisType.Auto)
    for spec in (P(None, None, "model"), P("model", None, None)):
        sharding = {"kernel": NamedSharding(mesh, spec)}
        placed = jax.device_put(params, lutjax.shardings_like(params, sharding))
        packed = lutjax.prepack(placed, implementation="xla")
        parts = jax.tree.map(lambda s: s.spec, lutjax.shardings_like(packed, sharding))
        back = jax.shard_map(
            lambda p: p["kernel"].materialize(), mesh=mesh, in_specs=(parts,), out_specs=spec
        )(packed)
        np.testing.assert_array_equal(back, lutjax.materialize(params)["kernel"])


def unaligned_shards():
    """What cannot be packed is refused by its path."""
    mesh = mesh_of(AxisType.Auto)
    params = lutjax.quantize({"kernel": normal(0, 96, 64)}, bits=4, group_size=36)

    def pack(spec):
        sharding = {"kernel": NamedSharding(mesh, spec)}
        placed = jax.device_put(params, lutjax.shardings_like(params, sharding))
        return lutjax.prepack(placed, implementation="xla")["kernel"]

    message = refusal(lambda: pack(P("model", None)))
    assert message.startswith("'kernel'"), message
    assert "4 shards of 24 rows are not whole groups of 36" in message, message
    assert pack(P(None, "model")).shards == (1, 4)  # the last group is a short one


def refusal(call):
    """What a ValueError says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def experts():
    """The columns of experts split: equal to one device, and no codes move."""
    params = lutjax.quantize({"kernel": normal(0, 5, WIDTH, HIDDEN)}, bits=4, group_size=16)
    sizes = jnp.array([0, 3, 30, 5, 2])

    def fn(params, x):
        return jax.lax.ragged_dot(x, params["kernel"], sizes)

    mesh = mesh_of(AxisType.Auto)
    spec = {"kernel": NamedSharding(mesh, P(None, None, "model"))}
    sharded = jax.device_put(params, lutjax.shardings_like(params, spec))
    for rows in (3, 40):
        x = jax.device_put(normal(2, rows, WIDTH), NamedSharding(mesh, P()))
        compiled = jax.jit(lutjax.lift(fn, strict=True)).lower(sharded, x).compile()
        expected = fn(lutjax.materialize(params), x)
        np.testing.assert_allclose(compiled(sharded, x), expected, rtol=2e-5, atol=2e-4)
        assert not collectives(compiled.as_text())


PROGRAMS = {
    f.__name__: f
    for f in (
        *(gspmd, unconstrained, manual_outside, manual_inside, explicit, adapters),
        *(prepacked, prepacked_with_quantised_scales, prepacked_for_tpus, prepacked_experts),
        *(unaligned_shards, misplaced, rings, experts),
    )
}

if __name__ == "__main__":
    failed = []
    for name in sys.argv[1:] or PROGRAMS:
        try:
            PROGRAMS[name]()
            print("PASSED", name)
        except Exception:
            import traceback

            traceback.print_exc()
            print("FAILED", name)
            failed.append(name)
    sys.exit(bool(failed))
