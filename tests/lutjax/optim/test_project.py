"""What `project` does beyond the duality: refreshes, state, accumulation, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lutjax import linear_maps as lm
from lutjax.adapters import dual
from lutjax.optim import flora, galore, project, relora


def gradient(step, shape=(6, 8)):
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=shape), jnp.float32)}


def states(optimizer, steps, shape=(6, 8)):
    """The state before the first and after every step."""
    params = gradient(-1 % 1000, shape)
    update = jax.jit(lambda g, s: optimizer.update(g, s, params))
    found = [jax.jit(optimizer.init)(params)]
    for step in range(steps):
        found.append(update(gradient(step, shape), found[-1])[1])
    return found


def basis_of(state):
    return np.asarray(jax.jit(lambda m: m.basis)(state.maps["w"]))


def test_galore_is_adam_on_the_projected_gradient():
    rank, refresh, scale, rate = 2, 3, 0.25, 0.1
    optimizer = galore(rate, rank, refresh, scale, exact_svd=True)
    params = gradient(99)
    update = jax.jit(optimizer.update)
    state = jax.jit(optimizer.init)(params)
    m = v = np.zeros((rank, 8))
    for step in range(7):
        g = np.asarray(gradient(step)["w"], np.float64)
        if step % refresh == 0:
            p = np.linalg.svd(g)[0][:, :rank]
            p = p * np.sign(p[np.abs(p).argmax(0), range(rank)])
        r = p.T @ g
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        hat = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        updates, state = update(gradient(step), state, params)
        # float32 against float64; singular vectors of a 6 x 8 matrix with clear gaps.
        np.testing.assert_allclose(updates["w"], -rate * scale * p @ hat, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("map_", [lm.SVD(2), lm.Gaussian(2)], ids=repr)
def test_maps_change_every_so_many_steps_and_never_in_between(map_):
    bases = [basis_of(s) for s in states(project(optax.adam(0.1), map_, refresh_every=3), 7)]
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    first = map_.depends_on == "gradient"  # random maps are drawn by init
    assert changed == [first, False, False, True, False, False, True]


@pytest.mark.parametrize("on_refresh", ["keep", "reset"])
@pytest.mark.parametrize(
    "inner",
    [
        optax.contrib.schedule_free_adamw(1e-2),
        optax.contrib.prodigy(),
        optax.contrib.dog(),
        optax.contrib.cocob(),
        optax.contrib.mechanize(optax.adam(1e-2)),
    ],
    ids=["schedule_free", "prodigy", "dog", "cocob", "mechanic"],
)
def test_inner_optimisers_may_remember_where_they_started(inner, on_refresh):
    """Without a projection they are as they are by themselves."""
    whole = project(inner, lm.Identity(), refresh_every=None, on_refresh=on_refresh)

    def train(optimizer):
        params = gradient(99)
        state = optimizer.init(params)
        for step in range(5):
            updates, state = optimizer.update(gradient(step), state, params)
            params = optax.apply_updates(params, updates)
        return params["w"]

    np.testing.assert_allclose(train(whole), train(inner), rtol=1e-5, atol=1e-6)


def test_a_scale_is_a_finite_number():
    with pytest.raises(ValueError, match=r"scale=nan must be finite"):
        project(optax.adam(0.1), lm.SVD(2), scale=float("nan"))
    with pytest.raises(TypeError, match="must be a number; vary it with"):
        project(optax.adam(0.1), lm.SVD(2), scale=optax.constant_schedule(1.0))


def test_refresh_every_none_draws_once():
    bases = [
        basis_of(s) for s in states(project(optax.adam(0.1), lm.SVD(2), refresh_every=None), 3)
    ]
    assert not np.array_equal(bases[0], bases[1])
    np.testing.assert_array_equal(bases[1], bases[3])


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
def test_moments_at_a_refresh(on_refresh):
    optimizer = project(
        optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: 1.0)),
        lm.Gaussian(2),
        refresh_every=3,
        on_refresh=on_refresh,
    )
    before, after = states(optimizer, 4)[3:5]

    def adam(state):
        inner = state.inner
        if on_refresh == "reset":
            inner = inner.inner_states["projected"].inner_state
        return inner[0], int(inner[1].count)

    (old, _), (new, schedule) = adam(before), adam(after)
    r = basis_of(after).T @ np.asarray(gradient(3)["w"])
    carried = {
        "keep": np.asarray(old.mu["w"]),
        "reset": np.zeros((2, 8)),
        "rotate": basis_of(after).T @ basis_of(before) @ np.asarray(old.mu["w"]),
    }[on_refresh]
    np.testing.assert_allclose(new.mu["w"], 0.9 * carried + 0.1 * r, rtol=1e-4, atol=1e-6)
    assert int(new.count) == (1 if on_refresh == "reset" else 4)
    assert schedule == 4  # the learning rate's schedule goes on


def test_a_reset_keeps_all_but_moments_and_their_counts():
    def of_projected(state):
        return state.inner.inner_states["projected"].inner_state

    inner = optax.chain(
        optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1.0, 0.0, 10), b1=0.9),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=1),
        optax.add_noise(1.0, 0.0, 0),
        optax.contrib.simplified_ademamix(optax.linear_schedule(1.0, 0.0, 10)),
    )
    optimizer = project(inner, lm.SemiOrthogonal(2), refresh_every=4, on_refresh="reset")
    params = gradient(0)
    state = jax.jit(optimizer.init)(params)
    # As a user does between steps.
    of_projected(state)[0].hyperparams["b1"] = jnp.asarray(0.5)
    update = jax.jit(lambda g, s: optimizer.update(g, s, params, value=jnp.asarray(1.0)))
    for step in range(5):
        before, (_, state) = state, update(gradient(step), state)
    (old, *_, _), (injected, plateau, noise, mix) = of_projected(before), of_projected(state)
    assert int(injected.count) == 5 and int(noise.count) == 5
    assert injected.hyperparams["b1"] == 0.5
    np.testing.assert_allclose(injected.hyperparams["learning_rate"], 0.6, rtol=1e-6)
    assert plateau.scale < 0.1 and not jnp.array_equal(noise.rng_key, jax.random.key(0))
    assert int(mix[-1].count) == 5  # the learning rate's schedule
    # Moments and what bias correction counts begin anew, whatever the fields are called.
    assert int(injected.inner_state[0].count) == 1 and int(mix[0].t) == 1
    latent = np.asarray(jax.jit(lambda m, g: m.down(g))(state.maps["w"], gradient(4)["w"]))
    np.testing.assert_allclose(injected.inner_state[0].mu["w"], 0.5 * latent, rtol=1e-4, atol=1e-6)
    assert int(old.inner_state[0].count) == 4


def test_a_reset_is_that_of_a_parameter_without_a_path_too():
    optimizer = project(optax.adam(lambda count: 1.0), lm.Gaussian(2), on_refresh="reset")
    state = optimizer.init(jnp.ones((4, 6)))
    inner = jax.tree.map(lambda x: x + 1, state.inner)
    latents = jnp.zeros((2, 6))
    carried = dual(optimizer).config.carry_inner(inner, latents, state.maps, state.maps)
    adam, schedule = carried.inner_states["projected"].inner_state
    assert int(adam.count) == 0 and not np.asarray(adam.mu).any()
    assert int(schedule.count) == 1


@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate"])
@pytest.mark.parametrize(
    ("of_gradients", "of_params"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)],
    ids=["bfloat16_gradients", "bfloat16_parameters"],
)
def test_gradients_may_have_another_dtype_than_parameters(on_refresh, of_gradients, of_params):
    optimizer = project(optax.adam(0.1), lm.Gaussian(2), refresh_every=2, on_refresh=on_refresh)
    params = {"w": gradient(0)["w"].astype(of_params)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(4):
        updates, state = update({"w": gradient(step)["w"].astype(of_gradients)}, state, params)
    assert np.isfinite(updates["w"]).all()


def test_the_state_can_be_donated_and_the_key_used_again():
    key = jax.random.key(7)
    optimizer = flora(0.1, 2, refresh_every=2, key=key)
    params = gradient(0)
    update = jax.jit(optimizer.update, donate_argnums=1)
    _, state = update(params, optimizer.init(params), params)
    assert np.isfinite(jax.random.normal(key))
    update(params, optimizer.init(params), params)
    update(params, state, params)


@pytest.mark.parametrize("seed", [np.int64(3), np.int32(3), jnp.asarray(3)], ids=repr)
def test_a_seed_may_be_any_integer(seed):
    expected = flora(0.1, 2, key=3).init(gradient(0))
    np.testing.assert_array_equal(flora(0.1, 2, key=seed).init(gradient(0)).key_data, [0, 3])
    np.testing.assert_array_equal(expected.key_data, [0, 3])


def test_a_seed_can_be_injected():
    make = optax.inject_hyperparams(galore, static_args=("rank", "refresh_every"))
    optimizer = make(0.1, rank=2, refresh_every=2, key=3)
    state = optimizer.init(gradient(0))
    np.testing.assert_array_equal(state.inner_state.key_data, [0, 3])
    updates, _ = jax.jit(optimizer.update)(gradient(0), state, gradient(0))
    expected = galore(0.1, rank=2, refresh_every=2, key=3)
    plain, _ = jax.jit(expected.update)(gradient(0), expected.init(gradient(0)))
    np.testing.assert_allclose(updates["w"], plain["w"], rtol=1e-4)


def test_a_reset_with_clipping_by_the_global_norm_outside():
    gradients = {"w": 3 * jnp.eye(4), "b": jnp.full(4, 3.0)}
    for on_refresh in ("keep", "reset"):
        inner = project(optax.sgd(1.0), lm.Identity(), on_refresh=on_refresh)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), inner)
        updates, _ = optimizer.update(gradients, optimizer.init(gradients))
        np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)


def test_a_reset_leaves_parameters_that_are_not_projected_alone():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    gradients = {"w": jnp.ones((4, 6)), "b": jnp.arange(1.0, 7.0)}

    def steps(optimizer):
        def body(_, carry):
            params, state = carry
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(lambda p: jax.lax.fori_loop(0, 5, body, (p, optimizer.init(p)))[0])(params)

    reset = steps(relora(0.1, 2, refresh_every=2))
    adam = steps(optax.adam(0.1))
    np.testing.assert_allclose(reset["b"], adam["b"], rtol=1e-6)


def test_gradients_accumulate_in_the_latent_space():
    shape, parts = (64, 96), 4
    multi = optax.MultiSteps(optax.adam(0.1), parts).gradient_transformation()
    accumulating = project(multi, lm.Gaussian(3), refresh_every=2 * parts)
    params = gradient(7, shape)
    state = jax.eval_shape(accumulating.init, params)
    # Nothing of the size of the weight is ever held between steps.
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 3 * 96
    whole = project(optax.adam(0.1), lm.Gaussian(3), refresh_every=None)
    mean = jax.tree.map(lambda *g: sum(g) / parts, *[gradient(i, shape) for i in range(parts)])
    expected, _ = jax.jit(whole.update)(mean, jax.jit(whole.init)(params), params)
    update, state = jax.jit(accumulating.update), jax.jit(accumulating.init)(params)
    for i in range(parts):
        updates, state = update(gradient(i, shape), state, params)
        if i < parts - 1:
            assert not np.asarray(updates["w"]).any()
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6)


def test_nd_weights_and_batch_axes():
    params = {"heads": jnp.ones((2, 6, 3, 4)), "plain": jnp.ones((6, 4)), "bias": jnp.ones(5)}
    numbers = {"heads": lm.DimensionNumbers(1, (2, 3)), "plain": None}
    optimizer = project(optax.adam(0.1), lm.SVD(2), weight_dimension_numbers=numbers)
    state = jax.eval_shape(optimizer.init, params)
    mu = optax.tree.get(state.inner, "mu")
    assert mu["heads"].shape == (2, 2, 12)
    assert mu["plain"].shape == (6, 4)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert updates["heads"].shape == (2, 6, 3, 4)
    # Optax's own type of dimension numbers will do.
    theirs = optax.contrib.GaLoreDimensionNumbers(0, 1)
    optimizer = project(optax.adam(0.1), lm.SVD(2), weight_dimension_numbers={"plain": theirs})
    assert list(jax.eval_shape(optimizer.init, params).maps) == ["plain"]


def test_the_state_does_not_depend_on_other_parameters_or_their_order():
    optimizer = flora(0.1, rank=2)
    alone = optimizer.init({"w": jnp.ones((4, 6))})
    among = optimizer.init({"a": jnp.ones((4, 6)), "w": jnp.ones((4, 6))})
    np.testing.assert_array_equal(basis_of(alone), basis_of(among))
    assert not np.array_equal(among.maps["a"].key_data, among.maps["w"].key_data)


def test_what_is_no_number_of_steps_or_no_dimension_numbers_is_refused():
    with pytest.raises(TypeError, match="refresh_every must be a number of steps or None"):
        project(optax.sgd(1.0), lm.SVD(2), refresh_every=optax.constant_schedule(3))
    for chosen, culprit in (({"block": {"w": True}}, "True for 'block/w'"), ("w", "'w' for ''")):
        with pytest.raises(TypeError, match=f"weight_dimension_numbers has {culprit}"):
            project(optax.sgd(1.0), lm.SVD(2), weight_dimension_numbers=chosen).init(W)


def test_updates_are_as_wide_as_the_inner_transformation_makes_them():
    params, narrow = {"w": jnp.ones((4, 6))}, {"w": jnp.ones((4, 6), jnp.bfloat16)}
    for optimizer in (optax.adam(1.0), project(optax.adam(1.0), lm.SVD(2))):
        updates, _ = optimizer.update(narrow, optimizer.init(params), params)
        assert updates["w"].dtype == jnp.float32


W = {"block": {"w": jnp.ones((4, 6))}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: project(optax.sgd(1.0), lm.SVD(2), refresh_every=0), "refresh_every=0"),
        (lambda: project(optax.sgd(1.0), lm.SVD(2), on_refresh="drop"), "on_refresh='drop'"),
        (lambda: project(optax.sgd(1.0), lm.SVD(5)).init(W), "'block/w': rank=5 of SVD.*=4"),
        (
            lambda: galore(1.0, 4).init({"layers": {"norm": jnp.ones((3, 8))}}),
            r"'layers/norm': rank=4.*say which are, weight_dimension_numbers=matching\(",
        ),
        (
            lambda: project(
                optax.sgd(1.0),
                lm.SVD(2),
                weight_dimension_numbers={"block": {"w": lm.DimensionNumbers(0, 2)}},
            ).init(W),
            "does not fit 'block/w'",
        ),
        (
            lambda: project(optax.scale_by_rms(), lm.SVD(2), on_refresh="rotate").init(W),
            "found no first moment",
        ),
        (
            lambda: project(optax.sgd(1.0), lm.PrincipalWeights(2, 1)).update(
                W, project(optax.sgd(1.0), lm.PrincipalWeights(2, 1)).init(W)
            ),
            "pass params to update",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "other", [lm.SVD(3), lm.Gaussian(2), lm.SVD(2, side="right"), lm.Identity()], ids=repr
)
def test_a_state_of_another_map_is_refused(other):
    ours = project(optax.sgd(1.0), lm.SVD(2))
    theirs = jax.eval_shape(project(optax.sgd(1.0), other).init, W)
    with pytest.raises(ValueError, match=r"map of 'block/w'.*resume with the map that made"):
        jax.eval_shape(ours.update, W, theirs)
    elsewhere = project(optax.sgd(1.0), other, weight_dimension_numbers={"block": {"w": None}})
    with pytest.raises(ValueError, match="resume with the weight_dimension_numbers"):
        jax.eval_shape(ours.update, W, jax.eval_shape(elsewhere.init, W))


def test_sketches_of_another_kind_are_refused():
    make = functools.partial(project, optax.sgd(1.0))
    state = jax.eval_shape(make(lm.Rademacher(2)).init, W)
    with pytest.raises(ValueError, match="resume with the map"):
        jax.eval_shape(make(lm.Gaussian(2)).update, W, state)


def test_factored_moments_stay_where_entries_are_selected_anew():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(160, 160)), jnp.float32)
    optimizer = project(
        optax.adafactor(1e-2, momentum=0.9, min_dim_size_to_factor=32),
        lm.PrincipalWeights(4, 2),
        refresh_every=2,
        on_refresh="rotate",
    )
    state = optimizer.init(weight)
    for _ in range(3):  # with a refresh
        updates, state = optimizer.update(weight, state, weight)
    assert updates.shape == weight.shape and np.isfinite(updates).all()
