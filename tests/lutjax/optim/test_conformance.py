"""What optax asks of a transformation, for every optimiser of the package."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lutjax import linear_maps as lm
from lutjax import optim
from lutjax.optim._state import is_coded

# Factories of the learning rate, so that it can be a schedule or be injected.
OPTIMIZERS = {
    "galore": functools.partial(optim.galore, rank=2, refresh_every=3, on_refresh="rotate"),
    "flora": functools.partial(optim.flora, rank=2, refresh_every=3),
    "relora": functools.partial(optim.relora, rank=2, refresh_every=3),
    "lift": functools.partial(optim.lift, rank=1, budget_rank=1, refresh_every=3),
    "spam": functools.partial(optim.spam, reset_every=3),
    "quantized_galore": lambda learning_rate: optim.quantized_state(
        optim.galore(learning_rate, rank=2, refresh_every=3), min_size=8
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def params_and_gradients(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def tree():
        return {
            "matrix": jnp.asarray(rng.normal(size=(4, 6)), dtype),
            "bias": jnp.asarray(rng.normal(size=1100), dtype),  # codes are smaller, table and all
        }

    return tree(), tree()


def run(optimizer, params, gradients, steps=5, **extra):
    """A few jitted steps in one loop; the carry checks that shapes and dtypes are stable."""

    @jax.jit
    def loop(params, gradients):
        def body(_, carry):
            params, state = carry
            updates, state = optimizer.update(gradients, state, params, **extra)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, body, (params, optimizer.init(params)))

    return loop(params, gradients)


@every_optimizer
def test_keeps_bfloat16_and_accepts_extra_arguments(name):
    params, gradients = params_and_gradients(jnp.bfloat16)
    optimizer = optax.with_extra_args_support(OPTIMIZERS[name](1e-2))
    after, _ = run(optimizer, params, gradients, unknown_argument=1)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
    chex.assert_tree_all_finite(after)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), after, params)))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "named matrices"])
def test_runs_in_the_optimizer_of_nnx(name):
    """Which shows parameters to ``init`` in boxes, and to ``update`` without."""
    model = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    named = {"weight_dimension_numbers": lm.matching("kernel")}
    transformation = OPTIMIZERS.get(name, functools.partial(optim.flora, rank=2, **named))(1e-2)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
        optimizer.update(model, gradients)
        return loss

    x = jax.random.normal(jax.random.key(0), (8, 32))
    losses = [float(step(model, optimizer, x)) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_encoded_moments_run_in_the_optimizer_of_nnx():
    """In the boxes that ``init`` is given, it would take a moment for one array."""
    transformation = optim.quantized_state(optax.adam(1e-2))
    model = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    state = transformation.init(params)
    assert any(map(is_coded, jax.tree.leaves(state, is_leaf=is_coded)))
    x = jax.random.normal(jax.random.key(0), (8, 64))
    for _ in range(3):
        gradients = nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
        updates, state = transformation.update(nnx.as_pure(nnx.state(gradients)), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, gradients)
    chex.assert_trees_all_close(nnx.as_pure(nnx.state(model)), params, rtol=1e-5)


class CallableTree:
    """As modules of Equinox are."""

    def __init__(self, matrix, bias):
        self.matrix, self.bias = matrix, bias

    def __call__(self, x):
        return x @ self.matrix + self.bias


jax.tree_util.register_pytree_with_keys(
    CallableTree,
    lambda m: (
        [(jax.tree_util.GetAttrKey(k), getattr(m, k)) for k in ("matrix", "bias")],
        None,
    ),
    lambda _, children: CallableTree(*children),
)


@every_optimizer
def test_parameters_may_be_callable(name):
    params, gradients = (CallableTree(**tree) for tree in params_and_gradients())
    after, _ = run(OPTIMIZERS[name](1e-2), params, gradients)
    assert not np.array_equal(after.matrix, params.matrix)


def test_dimension_numbers_may_be_in_a_callable_tree():
    params = CallableTree(**params_and_gradients()[0])
    numbers = CallableTree(lm.DimensionNumbers(), None)
    optimizer = optim.galore(1e-2, rank=2, weight_dimension_numbers=numbers)
    assert list(optimizer.init(params).maps) == ["matrix"]


def test_scalars_may_be_plain_numbers():
    params = {"matrix": jnp.ones((4, 6)), "temperature": 1.0}
    state = optim.galore(1e-2, rank=2).init(params)
    assert list(state.maps) == ["matrix"]


@every_optimizer
def test_a_second_call_does_not_compile_again(name):
    params, gradients = params_and_gradients()
    optimizer = OPTIMIZERS[name](1e-2)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, jax.jit(optimizer.init)(params))
    step(params, state)
    assert len(traces) == 1


@every_optimizer
def test_learning_rate_can_be_injected(name):
    params, gradients = params_and_gradients()
    plain, _ = run(OPTIMIZERS[name](1e-2), params, gradients)
    factory = OPTIMIZERS[name]
    if isinstance(factory, functools.partial):
        static = tuple(k for k in factory.keywords if k != "on_refresh")
        inject = optax.inject_hyperparams(factory.func, static_args=static)
        injected = functools.partial(inject, **factory.keywords)
    else:
        injected = optax.inject_hyperparams(lambda learning_rate: factory(learning_rate))
    after, _ = run(injected(learning_rate=1e-2), params, gradients)
    # float32; the learning rate is rounded to float32 before or after it is multiplied.
    chex.assert_trees_all_close(after, plain, rtol=1e-4, atol=1e-6)


@every_optimizer
def test_partition_and_masked_leave_the_others_alone(name):
    params, gradients = params_and_gradients()
    optimizer = OPTIMIZERS[name](1e-2)
    alone = {"matrix": params["matrix"]}
    expected, _ = run(optimizer, alone, {"matrix": gradients["matrix"]})
    labels = {"matrix": "ours", "bias": "frozen"}
    partitioned = optax.partition({"ours": optimizer, "frozen": optax.set_to_zero()}, labels)
    mask = {"matrix": True, "bias": False}
    masked = optax.chain(
        optax.masked(optimizer, mask),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, mask)),
    )
    for wrapped in (partitioned, masked):
        after, _ = run(wrapped, params, gradients)
        # Maps are drawn by path, so the other leaves don't change them.
        chex.assert_trees_all_close(after["matrix"], expected["matrix"], rtol=1e-5)
        chex.assert_trees_all_equal(after["bias"], params["bias"])


@every_optimizer
def test_multi_steps_moves_only_at_the_end(name):
    params, gradients = params_and_gradients()
    optimizer = optax.MultiSteps(OPTIMIZERS[name](1e-2), 3)
    step = jax.jit(lambda state: optimizer.update(gradients, state, params))
    state = jax.jit(optimizer.init)(params)
    for _ in range(2):
        updates, state = step(state)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    after = optax.apply_updates(params, step(state)[0])
    once, _ = run(OPTIMIZERS[name](1e-2), params, gradients, steps=1)
    chex.assert_trees_all_close(after, once, rtol=1e-4, atol=1e-6)


@every_optimizer
def test_tree_map_params_finds_the_latents(name):
    params, gradients = params_and_gradients()
    optimizer = OPTIMIZERS[name](1e-2)
    _, state = run(optimizer, params, gradients, steps=1)
    same = optax.tree.map_params(optimizer, lambda x: x, state)
    chex.assert_trees_all_equal(same, state)
    counts = optax.tree.map_params(
        optimizer, lambda x: None, state, transform_non_params=lambda x: x
    )
    assert len(jax.tree.leaves(counts)) < len(jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["galore", "flora", "lift", "spam"])
def test_sharding_specs_can_be_mapped_onto_the_state(name):
    params, _ = params_and_gradients()
    specs = jax.tree.map(lambda x: f"spec of {x.shape}", params)
    optimizer = OPTIMIZERS[name](1e-2)
    mapped = optax.tree.map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, params),
        specs,
        transform_non_params=lambda _: None,
    )
    assert optax.tree.get(mapped, "mu") == specs


@every_optimizer
@pytest.mark.parametrize("empty", [{}, (), [{}]], ids=repr)
def test_empty_trees(name, empty):
    optimizer = OPTIMIZERS[name](1e-2)
    state = optimizer.init(empty)
    updates, after = optimizer.update(empty, state, empty)
    assert updates == empty
    chex.assert_trees_all_equal_structs(after, state)


@pytest.mark.parametrize("name", ["galore", "flora", "relora", "lift", "spam", "quantized_galore"])
def test_converges_on_a_quadratic(name):
    params, target = params_and_gradients()
    # Periods of a realistic length: resets and resampled sketches disturb the moments.
    periods = {"spam": {"reset_every": 200, "warmup": 20}, "quantized_galore": {}}
    slower = functools.partial(OPTIMIZERS[name], **periods.get(name, {"refresh_every": 50}))
    optimizer = slower(optax.linear_schedule(0.3, 0.0, 600))

    @jax.jit
    def minimise(params):
        def body(_, carry):
            params, state = carry
            gradients = jax.tree.map(jnp.subtract, params, target)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 600, body, (params, optimizer.init(params)))[0]

    # Entries that LIFT never selects stay where they are; all others come within a few steps.
    distance = jax.tree.map(lambda a, b: jnp.abs(a - b).mean(), minimise(params), target)
    start = jax.tree.map(lambda a, b: jnp.abs(a - b).mean(), params, target)
    # Flora's updates are noisy, and states in 8 bits round small moments away.
    bound = {"lift": 0.6, "flora": 0.3, "quantized_galore": 0.3}.get(name, 0.05)
    for path in ("matrix", "bias"):
        assert distance[path] < bound * start[path], (name, path, distance[path])
