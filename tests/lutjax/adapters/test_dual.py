"""The duality in float64: one transformer trained in both forms, every map and optimiser."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lutjax import linear_maps as lm
from lutjax.adapters import dual
from lutjax.optim import galore, project

OPTIMIZERS = {
    "sgd_momentum": optax.sgd(3e-2, momentum=0.9),
    "adam": optax.adam(3e-3),
    "adafactor": optax.adafactor(
        3e-3, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, momentum=0.9
    ),
    "lion": optax.lion(1e-3, weight_decay=0.0),  # which is not its default
}
MAPS = {
    "identity": lm.Identity(),
    "svd": lm.SVD(3),
    "randomized_svd": lm.RandomizedSVD(3),
    "gaussian": lm.Gaussian(3),
    "rademacher": lm.Rademacher(3),
    "semi_orthogonal": lm.SemiOrthogonal(3),
    "kronecker": lm.Kronecker(lm.Gaussian(3, side="left"), lm.SemiOrthogonal(4, side="right")),
    "stacked": lm.Stacked(lm.SVD(2), lm.Rademacher(2)),
    "krona": lm.KronA((2, 4)),
    "principal": lm.PrincipalWeights(2, budget_rank=2),
}
WIDTH, LAYERS, VOCAB = 8, 2, 11


def transformer_params(dtype=np.float64):
    rng = np.random.default_rng(0)

    def weight(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    return {
        "embed": weight(VOCAB, WIDTH),
        "layers": {
            "norm": jnp.ones((LAYERS, WIDTH), dtype),
            "qkv": weight(LAYERS, WIDTH, 3 * WIDTH),
            "out": weight(LAYERS, WIDTH, WIDTH),
            "up": weight(LAYERS, WIDTH, 2 * WIDTH),
            "down": weight(LAYERS, 2 * WIDTH, WIDTH),
        },
    }


def loss_fn(params, tokens):
    """Next-token loss of a pre-norm causal transformer with a tied head."""
    x = params["embed"][tokens[:, :-1]]
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None]

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def block(x, layer):
        q, k, v = jnp.split(norm(x, layer["norm"]) @ layer["qkv"], 3, axis=-1)
        scores = jnp.einsum("btd,bsd->bts", q, k) / WIDTH**0.5
        x = x + jax.nn.softmax(jnp.where(mask, scores, -1e30)) @ v @ layer["out"]
        return x + jax.nn.silu(norm(x, layer["norm"]) @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(block, x, params["layers"])
    logits = x @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batch(step):
    """Tokens with structure, so that there is something to learn."""
    key = jax.random.fold_in(jax.random.key(1), step)
    start = jax.random.randint(key, (4, 1), 0, VOCAB)
    return (start + jnp.arange(7)[None] * (1 + start % 3)) % VOCAB


NUMBERS = lm.matching("layers/qkv", "layers/out", "layers/up", "layers/down")


def per_copy(optimizers):
    """One optimiser for each index of the leading axis: several runs in one program."""

    def slice_of(tree, i):
        return jax.tree.map(lambda x: x[i], tree)

    def init(params):
        return tuple(opt.init(slice_of(params, i)) for i, opt in enumerate(optimizers))

    def update(updates, state, params=None):
        pairs = [
            opt.update(slice_of(updates, i), state[i], slice_of(params, i))
            for i, opt in enumerate(optimizers)
        ]
        updates = jax.tree.map(lambda *x: jnp.stack(x), *[u for u, _ in pairs])
        return updates, tuple(s for _, s in pairs)

    return optax.GradientTransformation(init, update)


def largest_difference(a, b, axes=None):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x - y).astype(jnp.float64), axes) for x, y in pairs]
    )


def weight_step(optimizer, params, state, step, loss=loss_fn):
    gradients = jax.grad(loss)(params, batch(step))
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def adapter_step(training, state, step, loss=loss_fn):
    tokens = batch(step)

    def refresh(state):
        if training.config.map.depends_on != "gradient":
            return training.refresh(state)
        return training.refresh(state, jax.grad(loss)(training.weights(state), tokens))

    state = jax.lax.cond(training.is_due(state), refresh, lambda state: state, state)
    gradients = jax.grad(lambda r: loss(training.weights(state, r), tokens))(state.latents)
    return training.update(gradients, state)


def differences(optimizer, params, steps, loss=loss_fn):
    """After `steps` steps of both forms: weights, optimiser states, and largest differences."""
    training = dual(optimizer)

    @jax.jit
    def run(params):
        def body(carry, step):
            params, state, adapter, worst = carry
            params, state = weight_step(optimizer, params, state, step, loss)
            adapter = adapter_step(training, adapter, step, loss)
            difference = largest_difference(params, training.weights(adapter))
            return (params, state, adapter, jnp.maximum(worst, difference)), None

        start = (params, optimizer.init(params), training.init(params), jnp.zeros(()))
        (params, state, adapter, worst), _ = jax.lax.scan(body, start, jnp.arange(steps))
        return params, worst, state.inner, adapter.inner

    params, worst, state, adapter_state = run(params)
    return params, float(worst), state, adapter_state


@pytest.mark.parametrize("name", MAPS)
def test_both_forms_take_the_same_200_steps(name):
    # Four runs side by side, one of each optimiser. Three periods, so two merges with new maps.
    def loss(params, tokens):
        return jax.vmap(loss_fn, (0, None))(params, tokens).sum()

    with jax.enable_x64(True):
        projected = project(
            per_copy(list(OPTIMIZERS.values())),
            MAPS[name],
            refresh_every=80,
            scale=0.5,
            on_refresh="reset" if name == "rademacher" else "keep",
            weight_dimension_numbers=NUMBERS,
        )
        start = jax.tree.map(lambda x: jnp.stack([x] * len(OPTIMIZERS)), transformer_params())
        params, worst, state, adapter_state = differences(projected, start, 200, loss)
        # The same computation in exact arithmetic; rounding (1e-16) grows to about 1e-14.
        assert worst < 1e-10
        assert largest_difference(state, adapter_state) < 1e-10
        losses = jax.jit(jax.vmap(loss_fn, (0, None)))
        first, last = np.asarray(losses(start, batch(0))), np.asarray(losses(params, batch(0)))
    assert (last < 0.9 * first).all(), dict(zip(OPTIMIZERS, last, strict=True))


@pytest.mark.parametrize("name", ["gaussian", "principal", "svd"])
def test_both_forms_rotate_the_moments_alike(name):
    with jax.enable_x64(True):
        projected = project(
            optax.adam(3e-3),
            MAPS[name],
            refresh_every=8,
            on_refresh="rotate",
            weight_dimension_numbers=NUMBERS,
        )
        _, worst, state, adapter_state = differences(projected, transformer_params(), 20)
        assert worst < 1e-12
        assert largest_difference(state, adapter_state) < 1e-12


@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (optax.adamw(3e-3, weight_decay=0.1), "decay acts on S theta or on lambda"),
        (optax.adafactor(3e-3, min_dim_size_to_factor=2), "steps scale with the parameter's size"),
        (optax.lamb(3e-3), "trust ratios compare with the parameter's norm"),
    ],
    ids=["adamw", "adafactor_parameter_scale", "lamb"],
)
def test_the_forms_part_where_the_optimizer_sees_parameters(inner, why):
    with jax.enable_x64(True):
        projected = project(
            inner, lm.SemiOrthogonal(3), refresh_every=None, weight_dimension_numbers=NUMBERS
        )
        _, worst, _, _ = differences(projected, transformer_params(), 5)
    assert worst > 1e-5, why


def test_clipping_commutes_with_the_map_only_inside_it():
    clip = optax.clip_by_global_norm(0.1)
    map_ = lm.SemiOrthogonal(3)
    with jax.enable_x64(True):
        inside = project(optax.chain(clip, optax.sgd(0.1)), map_, weight_dimension_numbers=NUMBERS)
        _, worst, _, _ = differences(inside, transformer_params(), 5)
        assert worst < 1e-14
        # Clipping by the norm of the full gradient is another optimiser: its dual does not exist.
        outside = optax.chain(clip, project(optax.sgd(0.1), map_, weight_dimension_numbers=NUMBERS))
        params = transformer_params()
        a, _ = weight_step(inside, params, inside.init(params), 0)
        b, _ = weight_step(outside, params, outside.init(params), 0)
        assert largest_difference(a, b) > 1e-5
    with pytest.raises(TypeError, match="put what is chained around it inside"):
        dual(outside)


def test_a_map_that_follows_the_gradient_inside_a_period_has_no_dual():
    # Refreshing S at every step is still the dual of merging at every step, but not of training one
    # adapter: with the map of step 0 kept, the trajectories part.
    with jax.enable_x64(True):

        def make(every):
            return project(
                optax.adam(1e-2), lm.SVD(3), refresh_every=every, weight_dimension_numbers=NUMBERS
            )

        _, worst, _, _ = differences(make(1), transformer_params(), 5)
        assert worst < 1e-12
        params = transformer_params()
        moving, fixed = make(1), make(None)
        a, b = (params, moving.init(params)), (params, fixed.init(params))
        step_moving, step_fixed = (
            jax.jit(functools.partial(weight_step, opt)) for opt in (moving, fixed)
        )
        for step in range(3):
            a, b = step_moving(*a, step), step_fixed(*b, step)
        assert largest_difference(a[0], b[0]) > 1e-4


@pytest.mark.parametrize("map_", [lm.SVD(3), lm.Gaussian(3)], ids=repr)
def test_conversion_in_the_middle_of_a_run_changes_nothing(map_):
    with jax.enable_x64(True):
        optimizer = project(
            optax.adam(3e-3), map_, refresh_every=4, weight_dimension_numbers=NUMBERS
        )
        training = dual(optimizer)
        step_weights = jax.jit(functools.partial(weight_step, optimizer))
        step_adapter = jax.jit(functools.partial(adapter_step, training))
        params = transformer_params()
        state = optimizer.init(params)
        reference = []
        for step in range(12):
            params, state = step_weights(params, state, step)
            reference.append(params)

        params = transformer_params()
        state = optimizer.init(params)
        for step in range(3):
            params, state = step_weights(params, state, step)
        adapter = training.from_projected(params, state)  # inside a period
        chex.assert_trees_all_equal(adapter.inner, state.inner)
        chex.assert_trees_all_equal(training.weights(adapter), params)
        for step in range(3, 7):
            adapter = step_adapter(adapter, step)
        params, state = training.to_projected(adapter)
        chex.assert_trees_all_equal(adapter.inner, state.inner)
        for step in range(7, 12):
            params, state = step_weights(params, state, step)
        assert largest_difference(params, reference[-1]) < 1e-12


def test_dual_is_an_involution_and_refuses_other_things():
    optimizer = galore(1e-3, rank=2)
    assert dual(dual(optimizer)).config == optimizer.config
    with pytest.raises(TypeError, match="made by project"):
        dual(optax.adam(1e-3))


def test_conversion_refuses_the_state_of_another_map():
    params = transformer_params(np.float32)
    state = project(optax.adam(1e-3), lm.SVD(2), weight_dimension_numbers=NUMBERS).init(params)
    training = dual(project(optax.adam(1e-3), lm.SVD(3), weight_dimension_numbers=NUMBERS))
    with pytest.raises(ValueError, match=r"state's map of 'layers/.*resume with the map"):
        training.from_projected(params, state)


def test_a_run_can_be_donated():
    """Also after a refresh: parameters without a map are not in two places at once."""
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    training = dual(galore(1e-2, rank=2))
    update = jax.jit(training.update, donate_argnums=1)
    run = training.init(params)
    gradients = jax.tree.map(jnp.ones_like, run.latents)
    run = update(gradients, run)
    run = jax.jit(training.refresh)(run, jax.tree.map(jnp.ones_like, run.base))
    run = update(gradients, run)
    run = update(gradients, training.refresh(run, jax.tree.map(jnp.ones_like, run.base)))
    assert int(run.count) == 3 and np.isfinite(run.latents["b"]).all()
