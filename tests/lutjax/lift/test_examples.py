"""The examples run, stay compressed, and agree with the dense weights, gradients included."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from lift_checks import assert_close

import lutjax

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks, at import
@pytest.mark.parametrize("name", ["linen", "nnx", "equinox_model", "plain_functions"])
def test_example(name):
    if name == "equinox_model":
        pytest.importorskip("equinox")
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        apply, compressed, args, output = load(name).main()
    table = lutjax.lift.report(apply, compressed, *args)
    assert not table.materialized and not table.unused

    # Biases learn; arrays and the rest (an Equinox module holds functions) are told apart.
    learns, frozen = lutjax.partition(compressed, lambda path, leaf: path.endswith(("bias", "/b")))
    leaves, treedef = jax.tree.flatten(frozen)
    arrays = [a if hasattr(a, "dtype") else None for a in leaves]

    def frozen_with(arrays):
        return treedef.unflatten(
            [a if b is None else b for a, b in zip(leaves, arrays, strict=True)]
        )

    @jax.jit
    def both(learns, arrays, args):
        def run(fn, prepare):
            def loss(learns, *args):
                out = fn(prepare(lutjax.combine(learns, frozen_with(arrays))), *args)
                return jnp.sum(out**2), out

            wanted = tuple(
                i for i, a in enumerate([learns, *args])
                if i == 0 or jnp.issubdtype(a.dtype, jnp.floating)
            )  # fmt: skip
            gradients, out = jax.grad(loss, argnums=wanted, has_aux=True)(learns, *args)
            # One vector: some gradients, such as that of a key's bias, are zero but for rounding.
            return out, jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradients)])

        lifted = lutjax.lift(apply, strict=True)
        return run(lifted, lambda p: p), run(apply, lutjax.materialize)

    actual, expected = both(learns, arrays, args)
    assert expected[1].size > 64
    assert_close(actual, expected)
    assert_close(output, expected[0])
