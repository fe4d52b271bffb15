"""Primitives that hold programs, inside the lifted function and outside it."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from lift_checks import assert_close, assert_lifted, normal, weight

import lutjax

X = normal(2, 32)


def square(seed=0):
    return weight(32, 32, seed=seed)


def test_jit_inside():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    assert_lifted(lambda p, x: layer(p["b"], layer(p["a"], x)), {"a": square(), "b": square(1)}, X)


def test_scan_over_stacked_weights_and_with_a_constant_one():
    params = {"layers": weight(3, 32, 32), "shared": square(1)}

    def fn(p, x):
        def body(x, w):
            x = jnp.tanh(x @ w) @ p["shared"].T
            return x, x[0]

        return jax.lax.scan(body, x, p["layers"], reverse=True, unroll=2)

    assert_lifted(fn, params, X)


def test_scan_returns_weights_compressed():
    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w.T), x, w)

    _, ys = assert_lifted(fn, weight(3, 32, 32), X)
    assert ys.shape == (3, 32, 32) and lutjax.is_compressed(ys)


def test_loops_may_carry_weights_that_do_not_change():
    params = {"a": square(), "b": jnp.ones(32)}

    def step(i, carry):
        return (carry[0], jnp.tanh(carry[1] @ carry[0]["a"] + carry[0]["b"][None]))

    def unknown_count(p, x, n):
        return jax.lax.fori_loop(0, n, step, (p, x))[1]

    assert_lifted(lambda p, x: jax.lax.fori_loop(0, 3, step, (p, x))[1], params, X)
    assert_lifted(unknown_count, params, X, jnp.int32(3), gradients=False)


def test_while_with_weights_in_condition_and_body():
    def fn(w, x):
        def condition(x):
            return jnp.sum(jnp.abs(x @ w)) > 1.0

        return jax.lax.while_loop(condition, lambda x: 0.01 * x @ w, x)

    assert_lifted(fn, square(), X, gradients=False)


def test_a_carry_that_changes_is_materialized():
    def fn(w, x):
        return jax.lax.fori_loop(0, 2, lambda i, c: (c[0] * 0.5, c[1] @ c[0]), (w, x))[1]

    with pytest.warns(lutjax.MaterializationWarning, match="scan carry"):
        assert_lifted(fn, square(), X, strict=False)


@pytest.mark.parametrize("index", [0, 1, 5])
def test_switch(index):
    params = {"a": square(), "b": square(1)}
    branches = [lambda p, x: x @ p["a"], lambda p, x: x @ p["b"].T, lambda p, x: x]
    assert_lifted(lambda p, x, i: jax.lax.switch(i, branches, p, x), params, X, jnp.int32(index))


def test_cond_chooses_between_weights():
    def fn(p, x, flag):
        w = jax.lax.cond(flag, lambda p: p["a"], lambda p: p["b"], p)
        return x @ w

    assert_lifted(fn, {"a": square(), "b": square(1)}, X, jnp.array(True))
    different = {"a": square(), "b": weight(32, 32, bits=2)}
    with pytest.warns(lutjax.MaterializationWarning, match="cond output"):
        assert_lifted(fn, different, X, jnp.array(False), strict=False)


POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("h"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat(policy):
    @functools.partial(jax.checkpoint, policy=POLICIES[policy])
    def block(w, x):
        h = jax.ad_checkpoint.checkpoint_name(jnp.sin(x @ w), "h")
        return jnp.sin(h @ w.T)

    assert_lifted(lambda p, x: block(p["b"], block(p["a"], x)), {"a": square(), "b": square(1)}, X)


def products_in(jaxpr) -> int:
    """How many compressed products a program runs, in its backward pass too."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit" and eqn.params["name"] == "_run":  # of lut_matmul
            found += 1
        else:
            found += sum(map(products_in, jax.extend.core.jaxprs_in_params(eqn.params)))
    return found


def test_a_policy_about_dots_decides_about_compressed_products():
    def runs(policy):
        block = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w), policy=policy)
        lifted = lutjax.lift(lambda w, x: block(w, x).sum(), strict=True)
        grad = jax.make_jaxpr(jax.grad(lifted, argnums=1))(square(), X)
        return products_in(grad.jaxpr)

    policies = jax.checkpoint_policies
    # Forward 2 and backward 2; recomputing everything adds at least the first product again.
    assert runs(policies.dots_saveable) == runs(policies.everything_saveable)
    assert runs(policies.dots_saveable) < runs(policies.nothing_saveable)


@jax.custom_vjp
def scaled_gradient(x, w):
    return x @ w


scaled_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda residuals, g: (3.0 * g @ residuals[1].T, residuals[0].T @ g),
)


@jax.custom_jvp
def doubled_slope(x, w):
    return jnp.sin(x) @ w


@doubled_slope.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return doubled_slope(x, w), (2 * jnp.cos(x) * dx) @ w + jnp.sin(x) @ dw


@pytest.mark.parametrize("rule", [scaled_gradient, doubled_slope])
@pytest.mark.parametrize("where", ["plain", "jit", "scan", "remat", "vmap"])
def test_custom_derivatives_survive(rule, where):
    def fn(w, x):
        if where == "scan":
            return jax.lax.scan(lambda x, w: (rule(x, w), None), x, jnp.stack([w, w]))[0]
        wrap = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint,
                "vmap": lambda f: jax.vmap(f, in_axes=(0, None))}[where]  # fmt: skip
        return wrap(rule)(x[:, None] if where == "vmap" else x, w)

    assert_lifted(fn, square(), X)
    # ... and differ from the derivative that JAX would have taken.
    gradient = jax.grad(lambda x: lutjax.lift(fn, strict=True)(square(), x).sum())(X)
    plain = (lambda x, w: x @ w) if rule is scaled_gradient else (lambda x, w: jnp.sin(x) @ w)
    dense = square().materialize()
    two = (
        (lambda x: plain(plain(x, dense), dense)) if where == "scan" else lambda x: plain(x, dense)
    )
    factor = (3.0 if rule is scaled_gradient else 2.0) ** (2 if where == "scan" else 1)
    if rule is scaled_gradient or where != "scan":
        assert_close(gradient, factor * jax.grad(lambda x: two(x).sum())(X), 1e-4)


def test_custom_rules_without_weights_survive():
    @jax.custom_vjp
    def clip_gradient(x):
        return x

    clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))
    assert_lifted(lambda w, x: clip_gradient(x) @ w, square(), X)
    assert_lifted(
        lambda w, x: jax.jit(lambda w, x: clip_gradient(jax.nn.relu(x @ w)))(w, x), square(), X
    )


def test_custom_rule_with_integer_and_key_operands():
    @jax.custom_vjp
    def lookup(table, ids, x, key):
        return table[ids] * x + jax.random.normal(key, x.shape)

    def fwd(table, ids, x, key):
        return lookup(table, ids, x, key), (table, ids, x)

    def bwd(residuals, g):
        table, ids, _x = residuals
        return None, None, 5.0 * g * table[ids], None

    lookup.defvjp(fwd, bwd)

    def fn(w, x):
        return lookup(w, jnp.array([1, 4]), x, jax.random.key(0))

    assert_lifted(fn, square(), X)


@pytest.mark.parametrize("rule", [scaled_gradient, doubled_slope, lambda x, w: x @ jax.nn.relu6(w)])
@pytest.mark.parametrize("where", ["plain", "scan", "vmap"])
def test_parts_of_a_weight_learn_through_custom_derivatives(rule, where):
    w, left, right = square(), normal(32, 4, seed=2) / 8, normal(4, 32, seed=3)

    def loss(parts, x, compressed):
        scales, left, right = parts
        frozen = dataclasses.replace(w, scales=scales)
        low_rank = lutjax.LowRankArray.of(left, right)
        if compressed:
            kernel, wrap = lutjax.SumArray.of(frozen, low_rank), lutjax.lift
        else:
            kernel, wrap = frozen.materialize() + low_rank.materialize(), lambda f: f

        def run(kernel, x):
            if where == "scan":
                return jax.lax.scan(lambda x, _: (rule(x, kernel), x), x, None, length=2)
            return (jax.vmap(rule, (0, None)) if where == "vmap" else rule)(x, kernel)

        return sum(jnp.sum(y**2) for y in jax.tree.leaves(wrap(run)(kernel, x)))

    @jax.jit
    def both(parts, x):
        return [jax.grad(loss, (0, 1))(parts, x, compressed) for compressed in (True, False)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lutjax.MaterializationWarning)  # relu6 needs it
        actual, expected = both((w.scales, left, right), normal(*[3] * (where == "vmap"), 2, 32))
    assert_close(actual, expected)


def test_the_gradient_of_a_weight_is_computed_only_if_it_is_asked_for():
    @jax.custom_vjp
    def rule(x, w):
        return x @ w

    # What only the gradient of w needs cannot be had from a compressed weight.
    rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g + jnp.exp(r[1])))
    run = jax.jit(lutjax.lift(rule, strict=True))
    w = square()

    def loss(x, scales):
        return run(x, dataclasses.replace(w, scales=scales)).sum()

    # One traced call, differentiated in two ways.
    assert_close(jax.grad(loss)(X, w.scales), jnp.tile(w.materialize().sum(axis=1), (2, 1)))
    with pytest.raises(lutjax.MaterializationError, match="exp"):
        jax.grad(loss, 1)(X, w.scales)


def test_under_grad_vmap_scan_and_jit_outside():
    lifted = lutjax.lift(lambda p, x: jnp.tanh(x @ p["w"]) @ p["a"], strict=True)

    def dense_fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["a"]

    w, a = weight(3, 32, 32), normal(3, 32, 8)
    batch = normal(3, 5, 32)

    def outside(fn, w):
        def loss(a, w, x):
            return jnp.sum(fn({"w": w, "a": a}, x) ** 2)

        gradients = jax.vmap(jax.grad(loss))(a, w, batch)
        _, scanned = jax.lax.scan(
            lambda c, s: (c, jax.value_and_grad(loss)(s[1], s[0], batch[0])), 0, (w, a)
        )
        hessian_like = jax.grad(lambda a: jnp.sum(jax.grad(loss)(a, at(w, 0), batch[0]) ** 2))(a[0])
        return gradients, scanned, hessian_like

    def at(w, i):
        return jax.tree.map(lambda a: a[i], w)

    assert_close(jax.jit(functools.partial(outside, lifted))(w),
                 jax.jit(functools.partial(outside, dense_fn))(w.materialize()))  # fmt: skip


def test_lift_within_lift():
    inner = lutjax.lift(lambda w, x: jnp.sin(x @ w), strict=True)
    assert_lifted(lambda w, x: jax.vmap(lambda x: inner(w, x))(x), square(), X)


def test_effects_are_kept(capfd):
    def fn(w, x):
        jax.debug.print("first {}", x[0, 0] * 0)

        def body(i, x):
            jax.debug.print("step {}", i)
            return x @ w

        return jax.lax.fori_loop(0, 2, body, x)

    jax.block_until_ready(jax.jit(lutjax.lift(fn))(square(), X))
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n")[:3] == ["first 0.0", "step 0", "step 1"]


def test_keys_weak_types_and_integers():
    def fn(params, key, x, scale, count):
        noise = jax.random.normal(jax.random.fold_in(key, count), x.shape)
        return (x + noise) @ params * scale, key, count + 1, jnp.float16(1) * scale

    args = (jax.random.key(3), X, jnp.asarray(2.0), jnp.int32(4))
    assert args[2].weak_type
    assert_lifted(fn, square(), *args, gradients=False)


def test_named_scopes_reach_the_compiled_program():
    def fn(w, x):
        with jax.named_scope("my_layer"):
            return jnp.sin(x @ w)

    text = jax.jit(lutjax.lift(fn)).lower(square(), X).as_text(debug_info=True)
    assert "my_layer" in text


def test_numpy_inputs():
    assert_lifted(lambda w, x: x @ w, square(), np.asarray(X))


def test_a_branch_is_compiled_for_its_platforms_only():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    def on_tpu(w, x):  # which no CPU compiles
        y = x @ w
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype))(y)

    def run(w, x):
        return jax.lax.platform_dependent(w, x, tpu=on_tpu, default=lambda w, x: x @ w)

    w, x = weight(32, 24), normal(3, 32)
    y = jax.jit(lutjax.lift(run, strict=True))(w, x)
    assert_close(y, x @ w.materialize())
