"""What a user of lift sees: arguments, results, errors, reports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lift_checks import normal, weight

import lutjax
from pallas_kernels import native

W, X = weight(32, 24), normal(2, 32)


def test_static_arguments_and_results_pass_through():
    def fn(params, x, mode, *, times, flag=None):
        assert mode == "twice" and times == 2 and flag is None  # Python values, not tracers
        return {"y": times * (x @ params["w"]), "name": mode, "n": times, "none": None}

    out = lutjax.lift(fn)({"w": W}, X, "twice", times=2)
    assert out["name"] == "twice" and out["n"] == 2 and type(out["n"]) is int
    np.testing.assert_allclose(out["y"], 2 * X @ W.materialize(), rtol=1e-5, atol=1e-5)
    jitted = jax.jit(lambda p, x: lutjax.lift(fn)(p, x, "twice", times=2)["y"])
    np.testing.assert_allclose(jitted({"w": W}, X), out["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["b, 32", "b, t, 32"])
def test_exported_functions_take_any_number_of_rows_and_need_no_kernels(shape):
    leaves, treedef = jax.tree.flatten({"w": W})

    def run(leaves, x):
        params = jax.tree.unflatten(treedef, leaves)
        return lutjax.lift(lambda p, x: jnp.tanh(x @ p["w"]), strict=True)(params, x)

    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    exported = jax.export.export(jax.jit(run), platforms=("cpu", "tpu"))(leaves, x)
    assert native.LUT_MATMUL not in exported.mlir_module()
    for rows in (1, 7):
        actual = normal(rows, 32) if shape.count(",") == 1 else normal(2, rows, 32)
        y = jax.jit(exported.call)(leaves, actual)
        np.testing.assert_allclose(y, run(leaves, actual), rtol=1e-5, atol=1e-5)


def test_static_argnames_of_an_outer_jit():
    def fn(params, x, *, activation):
        return activation(x @ params)

    jitted = jax.jit(lutjax.lift(fn), static_argnames="activation")
    np.testing.assert_allclose(
        jitted(W, X, activation=jax.nn.relu), jax.nn.relu(X @ W.materialize()), rtol=1e-5, atol=1e-5
    )


def test_an_argument_that_is_returned_stays_compressed():
    w, turned, x = lutjax.lift(lambda w, x: (w, w.T, x))(W, X)
    assert w is W and turned.shape == (24, 32) and lutjax.is_compressed(turned)
    np.testing.assert_array_equal(x, X)


def test_numpy_arrays_have_the_dtype_that_they_are_traced_with():
    x = np.asarray(X, np.float64)
    y = lutjax.lift(lambda w, x: x @ w, strict=True)(W, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, X @ W.materialize(), rtol=1e-5, atol=1e-5)


def test_without_compressed_arguments_it_is_the_function():
    np.testing.assert_allclose(lutjax.lift(jnp.matmul, strict=True)(X, X.T), X @ X.T, rtol=1e-6)


def test_what_only_unused_results_need_is_not_computed():
    def fn(w, x):
        jnp.exp(w)  # no effect on the result
        return x @ w

    y = lutjax.lift(fn, strict=True)(W, X)
    np.testing.assert_allclose(y, X @ W.materialize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.dot(x, W),
        lambda x: jnp.einsum("bk,kn->bn", x, W),
        lambda x: (x, W),
        functools.partial(jnp.matmul, b=W),
        lambda x: x + W,
    ],
)
def test_captured_weights_are_an_error_that_says_what_to_do(fn):
    with pytest.raises(TypeError, match=r"LutArray.*pass it as an argument: lift\(fn\)\(params"):
        lutjax.lift(fn)(X)


def test_other_errors_are_left_alone():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        lutjax.lift(jnp.matmul)(X.T, W)
    with pytest.raises(ZeroDivisionError):
        lutjax.lift(lambda w: 1 / 0)(W)


def two_layers(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ (params["down"]["kernel"] * 0.5)


PARAMS = {
    "up": {"kernel": W, "bias": jnp.zeros(24)},
    "down": {"kernel": weight(24, 8)},
    "unused": {"kernel": weight(16, 8)},
}


def test_report_names_parameters_primitives_and_bytes():
    table = lutjax.lift.report(two_layers, PARAMS, X)
    assert [(u.path, u.primitive, u.outcome, u.nbytes) for u in table.uses] == [
        ("up/kernel", "dot_general", "fused", 0),
        ("down/kernel", "mul", "materialized", 24 * 8 * 4),
    ]
    assert table.unused == ("unused/kernel",)
    assert str(table).splitlines() == [
        "parameter    primitive             outcome",
        "up/kernel    dot_general           fused",
        "down/kernel  mul                   materialized (768 B)",
        "unused/kernel  -                     unused",
        "1 uses fused, 1 materialized",
    ]


def test_report_computes_nothing_and_takes_shapes():
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    assert lutjax.lift.report(two_layers, *shapes) == lutjax.lift.report(two_layers, PARAMS, X)


def test_report_counts_the_body_of_a_loop_once():
    layers = weight(5, 32, 32)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    assert len(lutjax.lift.report(fn, layers, X).fused) == 1


def test_report_tells_arguments_with_equal_paths_apart():
    def fn(teacher, student, x):
        return x @ teacher["w"] + x @ student["w"]

    uses = lutjax.lift.report(fn, {"w": W}, {"w": weight(32, 24, seed=5)}, X).uses
    assert [u.path for u in uses] == ["0/w", "1/w"]


def test_warning_once_for_a_call_and_names_at_most_three():
    def fn(params):
        return [jnp.exp(w) for w in params]

    with pytest.warns(lutjax.MaterializationWarning) as caught:
        lutjax.lift(fn)([weight(16, 8, seed=i) for i in range(5)])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("lift made weights dense: 0 by exp (512 B); 1 by exp")
    assert "and 2 more" in message


def test_tracing_leaves_no_dense_weight_in_the_program():
    program = jax.make_jaxpr(lutjax.lift(lambda w, x: x @ w))(W, X)
    outputs = [v.aval for eqn in program.jaxpr.eqns for v in eqn.outvars]
    assert not any(v.shape == W.shape for v in outputs)


def test_eval_shape_of_a_lifted_function():
    out = jax.eval_shape(lutjax.lift(lambda w, x: x @ w, strict=True), W, X)
    assert out.shape == (2, 24) and out.dtype == jnp.float32


def test_a_class_is_no_array():
    def cast(w, x, dtype):
        return (x @ w).astype(dtype)

    expected = (X @ W.materialize()).astype(jnp.float16)
    jitted = jax.jit(lutjax.lift(cast), static_argnames="dtype")
    for y in (lutjax.lift(cast)(W, X, np.float16), jitted(W, X, dtype=np.float16)):
        assert y.dtype == jnp.float16
        np.testing.assert_allclose(y, expected, rtol=1e-2, atol=1e-2)
    assert len(lutjax.lift.report(cast, W, X, np.float16).fused) == 1


def test_an_error_of_the_function_stays_what_it_is():
    def refuse(w, x):
        raise ValueError("expected a LutArray here")

    with pytest.raises(ValueError, match="expected a LutArray here"):
        lutjax.lift(refuse)(W, X)


def test_no_tracer_outlives_the_trace():
    with jax.checking_leaks():
        y = jax.jit(lutjax.lift(jnp.matmul))(X, W)
    np.testing.assert_allclose(y, X @ W.materialize(), rtol=1e-5, atol=1e-5)


def test_numpy_rows_times_a_weight():
    np.testing.assert_array_equal(np.asarray(X, np.float64) @ W, X @ W)
