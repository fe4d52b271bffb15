"""Primitives that rearrange a weight and leave it compressed."""

import jax
import jax.numpy as jnp
import pytest
from lift_checks import assert_lifted, normal, weight

import lutjax

W = {  # the weight; every function takes x with 64 columns
    "matrix": lambda: weight(64, 48),
    "transposed": lambda: weight(48, 64, axis=1),
}

REARRANGED = {
    "transpose": lambda w, x: x @ w.T.T,
    "reshape": lambda w, x: jnp.einsum("bij,ijl->bl", x.reshape(-1, 4, 16), w.reshape(4, 16, 48)),
    "expand_dims": lambda w, x: jnp.einsum("bk,akcn->bacn", x, jnp.expand_dims(w, (0, 2))),
    "newaxis": lambda w, x: x @ w[None, :, None, :][0, :, 0],
    "squeeze": lambda w, x: x @ jnp.squeeze(w[..., None], -1),
    "ravel_back": lambda w, x: x @ w.reshape(1, 64, 48, 1).reshape(64, 48),
    "columns": lambda w, x: x @ w[:, 5:29],
    "rows_at_groups": lambda w, x: x[:, 16:48] @ w[16:48],
    "last_rows": lambda w, x: x[:, 32:] @ w[32:],
    "both": lambda w, x: x[:, 16:32] @ w[16:32, 4:9],
    "dynamic_columns": lambda w, x: x @ jax.lax.dynamic_slice_in_dim(w, x.astype(int)[0, 0], 7, 1),
    "split": lambda w, x: [x @ part for part in jnp.split(w, [8, 24], axis=1)],
    "split_rows": lambda w, x: [x[:, :32] @ part for part in jnp.split(w, 2)],
    "convert": lambda w, x: x @ w.astype(jnp.float32).astype(x.dtype),
    "copy": lambda w, x: x @ jnp.copy(w),
    "barrier": lambda w, x: (lambda pair: pair[0] @ pair[1])(jax.lax.optimization_barrier((x, w))),
    "stop_gradient": lambda w, x: x @ jax.lax.stop_gradient(w),
    "checkpoint_name": lambda w, x: x @ jax.ad_checkpoint.checkpoint_name(w, "w"),
    "concatenate": lambda w, x: x @ jnp.concatenate([w, w[:, 8:16], w], axis=1),
    "concatenate_rows": lambda w, x: jnp.tile(x, 2) @ jnp.concatenate([w, w], axis=0),
    "concatenate_and_back": lambda w, x: x @ jnp.concatenate([w, w], axis=1)[:, 40:60],
    "concatenate_transposed": lambda w, x: x @ jnp.concatenate([w.T, w.T[:8]]).T,
    "stack": lambda w, x: jnp.einsum("bk,ekn->ebn", x, jnp.stack([w, w])),
    "add": lambda w, x: x @ (w + w),
}  # fmt: skip


@pytest.mark.parametrize("form", W)
@pytest.mark.parametrize("name", REARRANGED)
def test_rearranged_matrix(name, form):
    if form == "transposed" and name not in ("transpose", "columns", "concatenate", "reshape"):
        pytest.skip("one orientation is enough")
    w = W[form]()
    turned = (lambda w: w) if form == "matrix" else (lambda w: w.T)
    assert_lifted(lambda w, x: REARRANGED[name](turned(w), x), w, normal(2, 64))


STACKED = {
    "index": lambda w, x: x @ w[1],
    "negative": lambda w, x: x @ w[-1],
    "range": lambda w, x: jnp.einsum("bk,ekn->ben", x, w[1:]),
    "stride": lambda w, x: jnp.einsum("bk,ekn->ben", x, w[::2]),
    "unstack": lambda w, x: [x @ part for part in jnp.unstack(w)],
    "iterate": lambda w, x: [x @ part for part in w],
    "columns": lambda w, x: x @ w[:, :, 8:16],
    "swap": lambda w, x: jnp.einsum("bk,enk->ben", x, jnp.swapaxes(w, 1, 2)),
    "split": lambda w, x: [x @ part[0] for part in jnp.split(w, 3)],
    "more_axes": lambda w, x: jnp.einsum("bk,akn->ban", x, w.reshape(3, 1, 64, 48)[:, 0]),
    "concatenate": lambda w, x: x @ jnp.concatenate([w[:1], w]),
    "stack": lambda w, x: jnp.stack([w[0], w[2]]) @ jnp.ones(48) + x[0][None],
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked(name):
    assert_lifted(STACKED[name], weight(3, 64, 48), normal(2, 64))


def test_multi_head_kernel_is_cut_by_heads():
    w = weight(32, 4, 8, axis=0)

    def fn(w, x):
        some = jnp.einsum("bd,dhe->bhe", x, w[:, 1:3])
        more = jnp.einsum("bd,dhe->bhe", x, jnp.concatenate([w, w[:, :2]], axis=1))
        flat = x @ w.reshape(32, 32)
        return some, more, flat

    assert_lifted(fn, w, normal(2, 32))


ONE_HEAD = {
    "slice": lambda w, x: jnp.einsum("bd,dhe->bhe", x, w[..., 8:]),
    "split": lambda w, x: [jnp.einsum("bd,dhe->bhe", x, p) for p in jnp.split(w, [6], axis=-1)],
    "dynamic_slice": lambda w, x: jnp.einsum(
        "bd,dhe->bhe", x, jax.lax.dynamic_slice_in_dim(w, x.astype(int)[0, 0], 6, 2)
    ),
    "concatenate": lambda w, x: jnp.einsum(
        "bd,dhe->bhe", x, jnp.concatenate([w, w], axis=-1)
    ),
    "pieces of heads": lambda w, x: jnp.einsum(
        "bd,dhe->bhe", x, jnp.concatenate([w, w.reshape(32, 2, 8)[:, 1:]], axis=2)
    ),
    "add": lambda w, x: x @ (w[..., 8:] + w.reshape(32, 2, 8)[:, :1]).reshape(32, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_HEAD)
def test_an_axis_within_one_of_size_one_is_cut_and_joined(name):
    assert_lifted(ONE_HEAD[name], weight(32, 1, 16, axis=0), normal(2, 32))


MATERIALIZED = {  # name of the primitive that is blamed
    "mul": lambda w, x: x @ (w * 2.0),
    "add": lambda w, x: x @ (w + jnp.outer(x[0], jnp.ones(48))),
    "reduce_sum": lambda w, x: jnp.sum(w) + x,
    "exp": lambda w, x: x @ jnp.exp(w),
    "slice": lambda w, x: x[:, 3:19] @ w[3:19],
    "rev": lambda w, x: x @ w[:, ::-1],
    "scan": lambda w, x: x @ jax.lax.map(lambda row: row[::-1], w),
    "reshape": lambda w, x: x @ w.reshape(64, 48).reshape(-1).reshape(64, 48),
    "convert_element_type": lambda w, x: x + w.astype(int)[0, 0].astype(jnp.float32),
    "concatenate": lambda w, x: x @ jnp.concatenate([w, jnp.ones((64, 1))], axis=1),
    "dot_general": lambda w, x: w.T @ w + x[0, 0],
    "split": lambda w, x: [x @ part for part in jnp.split(w, [0, 16], axis=1)],  # a size of zero
    "dynamic_slice": lambda w, x: x[:, :8] @ jax.lax.dynamic_slice_in_dim(w, jnp.int32(3), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MATERIALIZED)
def test_what_is_not_handled_is_dense_and_reported(name):
    w, x, fn = weight(64, 48), normal(2, 64), MATERIALIZED[name]
    with pytest.warns(lutjax.MaterializationWarning, match=f"kernel by {name}"):
        assert_lifted(lambda params, x: fn(params["kernel"], x), {"kernel": w}, x, strict=False)
    with pytest.raises(lutjax.MaterializationError, match=f"'kernel' LutArray.*'{name}'"):
        lutjax.lift(lambda params, x: fn(params["kernel"], x), strict=True)({"kernel": w}, x)


def test_a_cast_to_eight_bits_rounds():
    w = weight(64, 48)
    with pytest.warns(lutjax.MaterializationWarning, match="convert_element_type"):
        assert_lifted(lambda w: w.astype(jnp.float8_e4m3fn).astype(jnp.float32), w, strict=False)


def test_weights_of_different_kinds_are_not_stacked_but_concatenated():
    params = {"a": weight(64, 48), "b": weight(64, 48, bits=3)}
    assert_lifted(lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1), params, normal(2, 64))

    def stack(p, x):
        return x @ jnp.stack([p["a"], p["b"]])

    with pytest.raises(lutjax.MaterializationError, match="'stack'"):
        lutjax.lift(stack, strict=True)(params, normal(2, 64))
