"""quantize, recipes, summaries and materialize against the formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lutjax
from lutjax import LutConfig, Recipe, Rule, codebooks
from lutjax.arrays import is_compressed
from lutjax.paths import named_leaves
from lutjax.transforms import quantize_array
from lutjax.transforms.quantize import match_rules, weight_view

WEIGHT = np.random.default_rng(0).normal(size=(576, 24)).astype(np.float32)


def oracle(weight, table, group_size):
    """Nearest table value in units of the group's bfloat16 scale, in float64."""
    affine = table.min() >= 0
    out = np.empty(weight.shape)
    for start in range(0, weight.shape[0], group_size):
        group = weight[start : start + group_size].astype(np.float64)
        low = group.min(0) if affine else np.zeros(group.shape[1])
        scale = np.ptp(group, 0) if affine else np.abs(group).max(0)
        low, scale = (np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in (low, scale))
        units = (group - low) / np.where(scale == 0, 1, scale)
        nearest = np.abs(units[..., None] - table).argmin(-1)
        out[start : start + group_size] = table[nearest] * scale + low
    return out


@pytest.mark.parametrize(
    ("bits", "group_size", "codebook"),
    [
        (1, 64, "affine"),
        (2, 32, "nf"),
        (3, 128, "nf"),  # 576 = 4 * 128 + 64
        (4, 16, "nf"),
        (4, 64, "int"),
        (4, 512, "fp4"),
        (4, "column", "nf_flute"),
        (5, 64, "affine"),
        (6, 64, "nf"),
        (7, 256, "int"),
        (8, 64, "nf"),
        (2, 64, (-1.0, -0.25, 0.3, 0.9)),
    ],
)
def test_every_weight_becomes_the_nearest_value(bits, group_size, codebook):
    array = lutjax.quantize(
        jnp.asarray(WEIGHT), bits=bits, group_size=group_size, codebook=codebook
    )
    config = LutConfig(bits, group_size, codebook)
    size = 576 if group_size == "column" else group_size
    expected = oracle(WEIGHT, config.table().astype(np.float64), size)
    actual = np.asarray(array.materialize(), np.float64)
    # Equal but where a weight lies halfway between two values: there it may take either.
    differs = np.abs(actual - expected) > 1e-5
    assert differs.mean() < 1e-3
    np.testing.assert_allclose(
        np.abs(actual - WEIGHT)[differs], np.abs(expected - WEIGHT)[differs], rtol=1e-3
    )
    groups = -(-576 // size)
    assert array.scales.shape == (groups, 24) and array.bits == bits
    offsets = codebook == "affine"
    assert array.nbytes == 72 * bits * 24 + groups * 24 * 2 * (1 + offsets) + 2**bits * 4


def test_kmeans_is_better_than_the_table_it_starts_from():
    def error(codebook):
        array = lutjax.quantize(jnp.asarray(WEIGHT), bits=3, codebook=codebook)
        return float(jnp.sum((array.materialize() - WEIGHT) ** 2))

    assert error("kmeans") < error("nf")


def test_double_quantisation_stores_what_the_formula_says():
    b0, block = 6, 16
    double = lutjax.DoubleQuant(bits=b0, block=block)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(512, 64)), jnp.float32)
    array = lutjax.quantize(weight, bits=3, group_size=64, double_quant=double)
    # 3 + b0 / B0 + b1 / (B0 B1) bits a weight, the table and one float32 floor.
    bits = 3 + b0 / 64 + 32 / (64 * block)
    assert array.nbytes == bits * weight.size / 8 + 8 * 4 + 4
    plain = lutjax.quantize(weight, bits=3, group_size=64)
    errors = [jnp.linalg.norm(a.materialize() - weight) for a in (array, plain)]
    assert errors[0] < 1.05 * errors[1]


def test_double_quantisation_takes_offsets_too():
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(512, 64)), jnp.float32)
    plain = lutjax.quantize(weight, codebook="affine", group_size=32, scale_dtype="float32")
    double = lutjax.DoubleQuant(bits=6, block=16, dtype="float16")
    array = lutjax.quantize(weight, codebook="affine", group_size=32, double_quant=double)
    # 4 + 2 (b0 / B0 + b1 / (B0 B1)) bits a weight, the table and two float32 floors.
    bits = 4 + 2 * (6 / 32 + 16 / (32 * 16))
    assert array.nbytes == bits * weight.size / 8 + 16 * 4 + 2 * 4
    errors = [jnp.linalg.norm(a.materialize() - weight) for a in (array, plain)]
    assert errors[0] < 1.05 * errors[1]
    x = jax.random.normal(jax.random.key(0), (3, 512))
    np.testing.assert_allclose(x @ array, x @ array.materialize(), rtol=1e-4, atol=1e-4)


def test_groups_of_zeros_stay_zero():
    weight = jnp.asarray(WEIGHT).at[:64].set(0.0)
    for codebook in ("nf", "affine", "kmeans", "gaussian"):
        array = lutjax.quantize(weight, bits=4, codebook=codebook)
        np.testing.assert_allclose(array.materialize()[:64], 0, atol=1e-7)
    for recipe in (Recipe.uniform(), Recipe.higgs(group_size=64)):
        assert not lutjax.quantize(jnp.zeros((64, 8)), recipe).materialize().any()


def test_higgs_errs_as_little_as_its_table_whatever_the_weights():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(3, size=(576, 64)).astype(np.float32)  # 576 = 512 + 64
    heavy[5] *= 5
    for bits, error in ((2, 0.1076), (3, 0.0296), (4, 0.00777), (5, 0.0025)):
        array = lutjax.quantize(jnp.asarray(heavy), Recipe.higgs(bits))
        residual = np.asarray(array.materialize()) - heavy
        assert np.square(residual).sum() / np.square(heavy).sum() == pytest.approx(error, rel=0.05)
        assert array.nbytes == 576 * 64 * bits / 8 + 2 * 64 * 2 + array.base.lut.nbytes
    plain = lutjax.quantize(jnp.asarray(heavy), bits=4, group_size=64)
    assert np.square(plain.materialize() - heavy).sum() / np.square(heavy).sum() > 0.01


def test_gaussian_tables_are_in_units_of_the_root_mean_square():
    weight = np.asarray(WEIGHT[:100], np.float64)  # a last group that is shorter
    array = lutjax.quantize(
        jnp.asarray(WEIGHT[:100]), bits=3, codebook="gaussian", scale_dtype="float32"
    )
    scales = [np.sqrt(np.square(part).mean(axis=0)) for part in (weight[:64], weight[64:])]
    np.testing.assert_allclose(array.scales, scales, rtol=1e-6)
    units = weight / np.repeat(scales, 64, axis=0)[:100]
    table = codebooks.gaussian(3)[:, 0].astype(np.float64)
    nearest = table[np.abs(units[..., None] - table).argmin(-1)]
    expected = nearest * np.repeat(scales, 64, axis=0)[:100]
    np.testing.assert_allclose(array.materialize(), expected, atol=1e-5)


@pytest.mark.parametrize("rotate", [False, True])
def test_pairs_of_stacked_weights_equal_their_slices(rotate):
    config = LutConfig(4, 32, "gaussian", vector_size=2, rotate=rotate)
    stack = jnp.asarray(np.random.default_rng(2).normal(size=(3, 77, 8)), jnp.float32)
    stacked = lutjax.quantize({"kernel": stack}, Recipe((Rule("*", config),)))["kernel"]
    assert stacked.shape == (3, 77, 8)
    for i in range(3):
        alone = lutjax.quantize(stack[i], Recipe((Rule("*", config),)))
        np.testing.assert_array_equal(stacked.materialize()[i], alone.materialize())


@pytest.mark.parametrize("recipe", [Recipe.uniform(), Recipe.higgs(3)], ids=["nf", "higgs"])
def test_jit_and_eval_shape_agree_with_eager(recipe):
    params = {"mlp": {"kernel": jnp.asarray(WEIGHT), "bias": jnp.zeros(24)}}
    quantize = functools.partial(lutjax.quantize, recipe=recipe)
    eager = quantize(params)
    jitted = jax.jit(quantize)(params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
    shapes = jax.eval_shape(quantize, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)
    assert repr(shapes["mlp"]["kernel"]) == repr(eager["mlp"]["kernel"])


def test_the_temporary_memory_of_one_matrix_is_a_few_times_its_size():
    weight = jax.ShapeDtypeStruct((1024, 512), jnp.float32)
    quantize = jax.jit(lambda w: lutjax.quantize(w, bits=4))
    memory = quantize.lower(weight).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say")
    assert memory.temp_size_in_bytes < 4 * 1024 * 512 * 4


@pytest.mark.parametrize(
    ("path", "shape", "rule", "expected"),  # batch axes, axes of K, axes of N
    [
        ("mlp/kernel", (8, 4), {}, (0, (0,), (1,))),
        ("linear/weight", (8, 4), {}, (0, (1,), (0,))),
        ("layers/kernel", (3, 8, 4), {}, (1, (0,), (1,))),
        ("layers/weight", (3, 8, 4), {}, (1, (1,), (0,))),
        ("layers/experts/kernel", (3, 2, 8, 4), {}, (2, (0,), (1,))),
        ("query/kernel", (8, 2, 4), {"axis": -3}, (0, (0,), (1, 2))),
        ("layers/query/kernel", (3, 8, 2, 4), {"axis": -3}, (1, (0,), (1, 2))),
        ("out/kernel", (2, 4, 8), {"axis": (-3, -2)}, (0, (0, 1), (2,))),
        ("layers/out/kernel", (3, 2, 4, 8), {"axis": (-3, -2)}, (1, (0, 1), (2,))),
        ("w", (8, 2, 4), {"axis": (1, 2), "batch_ndim": 0}, (0, (1, 2), (0,))),
        ("w", (3, 8, 4), {"axis": 0, "batch_ndim": 0}, (0, (0,), (1, 2))),
    ],
)
def test_which_axes_are_summed_over(path, shape, rule, expected):
    count, view = weight_view(shape, Rule("*", LutConfig(), **rule), path)
    assert (count, view.k_axes, view.n_axes) == expected


def test_stacked_weights_equal_their_slices():
    stack = jnp.asarray(np.random.default_rng(3).normal(size=(3, 64, 16)), jnp.float32)
    together = lutjax.quantize(stack, bits=3, group_size=32)
    for i in range(3):
        alone = lutjax.quantize(stack[i], bits=3, group_size=32)
        np.testing.assert_array_equal(together.materialize()[i], alone.materialize())


PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((16, 32))},
    "layers": {"0": {"up_proj": {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16)}}},
    "norm": {"scale": jnp.ones(32)},
    "lm_head": {"kernel": jnp.ones((32, 16))},
    "steps": jnp.int32(1),
}
C = LutConfig(bits=4, group_size=16)


def quantization_error(bits, **codebook):
    found = lutjax.quantize(WEIGHT, bits=bits, **codebook).materialize()
    return float(np.linalg.norm(found - WEIGHT))


@pytest.mark.parametrize(
    ("bits", "name", "other"),
    [(2, "nf", "int"), (4, "nf", "int"), (6, "int", "nf"), (8, "int", "nf")],
)
def test_the_default_codebook_is_the_better_of_two(bits, name, other):  # at 5 bits they are alike
    assert quantization_error(bits) == quantization_error(bits, codebook=name)
    assert quantization_error(bits) < quantization_error(bits, codebook=other)


@pytest.mark.parametrize(
    ("bits", "vector_size", "name"),
    [
        *[(1, 1, "gaussian"), (2, 1, "nf"), (5, 1, "nf"), (6, 1, "int"), (8, 1, "int")],
        *[(4, 2, "gaussian"), (8, 2, "gaussian")],
    ],
)
def test_the_default_codebook_is_one_that_exists(bits, vector_size, name):
    assert LutConfig(bits, vector_size=vector_size).codebook == name
    assert vector_size > 1 or Recipe.uniform(bits).rules[0].config.codebook == name


def test_the_default_codebook_is_fixed_once_it_is_made():
    assert dataclasses.replace(LutConfig(4), bits=8).codebook == "nf"
    assert dataclasses.replace(LutConfig(4), bits=8, codebook="default") == LutConfig(8)


def compressed_paths(recipe):
    summary = lutjax.summarize(lutjax.quantize(PARAMS, recipe))
    return [leaf.path for leaf in summary.leaves if leaf.compressed]


def test_defaults_leave_embeddings_norms_and_head_dense_unless_named_in_full():
    up, head = "layers/0/up_proj/kernel", "lm_head/kernel"
    assert compressed_paths(Recipe((Rule("*", C),))) == [up]
    assert compressed_paths(Recipe((Rule(head, C), Rule("*", C)))) == [up, head]
    assert compressed_paths(Recipe((Rule(up, None), Rule("*", C)))) == []
    assert compressed_paths(Recipe((Rule("*kernel", C),), dense=())) == [up, head]


def test_a_single_array_takes_the_rule_that_matches_its_name():
    recipe = Recipe((Rule("*down*", LutConfig(8, 16)), Rule("*", LutConfig(3, 16))))
    assert lutjax.quantize(jnp.asarray(WEIGHT), recipe).bits == 3
    with pytest.raises(ValueError, match="no rule for a single array; use the pattern"):
        lutjax.quantize(jnp.asarray(WEIGHT), Recipe((Rule("kernel", LutConfig(8, 16)),)))


def test_names_in_full_may_have_brackets():
    params = {"a[0]": {"kernel": jnp.asarray(WEIGHT)}}
    recipe = Recipe((Rule("a[0]/kernel", LutConfig(3, 16)),))
    assert lutjax.quantize(params, recipe)["a[0]"]["kernel"].bits == 3


def test_a_codebook_may_be_an_array():
    values = np.linspace(-1, 1, 16)
    assert LutConfig(codebook=values) == LutConfig(codebook=tuple(values))


def test_rules_are_a_tuple():
    assert hash(Recipe([Rule("*", C)])) == hash(Recipe((Rule("*", C),)))
    with pytest.raises(TypeError, match=r"give a tuple of them, such as \(Rule"):
        Recipe(Rule("*", C))


def test_recipes_survive_json():
    double = lutjax.DoubleQuant(bits=6)
    rules = (
        Rule("*/out/kernel", LutConfig(3, "column", double_quant=double), axis=(0, 1)),
        Rule("*", LutConfig(1, codebook=(-1.0, 1.0)), batch_ndim=1),
        Rule("pairs", LutConfig.higgs(2.5, 64)),
        Rule("head", None),
    )
    recipe = Recipe(rules, dense=("x",), embeddings=LutConfig(6, double_quant=double))
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_embeddings_and_the_head_have_a_configuration_of_their_own():
    params = {
        "embed": {"embedding": WEIGHT.T, "norm": {"scale": np.ones(16, np.float32)}},
        "up": {"kernel": WEIGHT},
        "lm_head": {"kernel": WEIGHT, "bias": np.ones((2, 16), np.float32)},
        "special_embed": {"kernel": WEIGHT},
    }
    rules = (Rule("*", LutConfig(3, 16)), Rule("special_embed/kernel", None))
    recipe = Recipe(rules, embeddings=LutConfig(6, 16))
    bits = {
        path: getattr(leaf, "bits", None)
        for path, leaf in named_leaves(lutjax.quantize(params, recipe))
    }
    assert bits == {
        "embed/embedding": 6,
        "embed/norm/scale": None,
        "up/kernel": 3,
        "lm_head/kernel": 6,
        "lm_head/bias": None,
        "special_embed/kernel": None,
    }
    assert Recipe.uniform(bits=3, embedding_bits=6).embeddings == LutConfig(6)
    assert Recipe.higgs(3).with_embeddings().embeddings == LutConfig(8, codebook="int")
    scales = {"scale_dtype": "float16", "double_quant": lutjax.DoubleQuant()}
    both = Recipe.uniform(3, 32, embedding_bits=8, **scales)
    assert both.embeddings == LutConfig(8, 32, "int", **scales)


HEAD = {"lm_head": {"kernel": jnp.ones((64, 8))}, "up": {"kernel": jnp.ones((64, 8))}}


@pytest.mark.parametrize("embedding_bits", [None, 8])
def test_a_glob_that_reaches_only_what_stays_dense_is_an_error(embedding_bits):
    recipe = Recipe((Rule("*lm_head*", LutConfig(4)), Rule("*", LutConfig(3))))
    if embedding_bits is not None:
        recipe = recipe.with_embeddings(embedding_bits)
    with pytest.raises(ValueError, match=r"'\*lm_head\*' reaches only .* such as 'lm_head/kernel'"):
        lutjax.quantize(HEAD, recipe)


def test_a_glob_that_leaves_the_head_dense_is_not_overridden():
    recipe = Recipe((Rule("*lm_head*", None), Rule("*", LutConfig(3))))
    assert not is_compressed(lutjax.quantize(HEAD, recipe)["lm_head"]["kernel"])
    with pytest.raises(ValueError, match="give a rule its full path"):
        lutjax.quantize(HEAD, recipe.with_embeddings(8))


def test_a_rule_that_leaves_norms_dense_is_true_with_embeddings_too():
    recipe = Recipe((Rule("*norm*", None), Rule("*", LutConfig(3, 16)))).with_embeddings(8, 16)
    params = {"norm": {"scale": np.ones(32)}, "up": {"kernel": WEIGHT}, "embed": {"w": WEIGHT}}
    found = lutjax.quantize(params, recipe)
    assert not is_compressed(found["norm"]["scale"]) and found["embed"]["w"].bits == 8


@pytest.mark.parametrize("pattern", ["*/kernel", "up/kernel"])
def test_a_rule_behind_one_that_matches_all_it_does_is_an_error(pattern):
    recipe = Recipe((Rule("*", LutConfig(3)), Rule(pattern, LutConfig(8))))
    with pytest.raises(ValueError, match=r"decides about nothing: '\*', which comes before it"):
        lutjax.quantize({"up": {"kernel": jnp.ones((64, 8))}}, recipe)
    twice = Recipe((Rule("up/*", C), Rule("*", None), Rule("*", LutConfig(8))))
    with pytest.raises(ValueError, match=r"the first rule '\*' decides for all of them; leave out"):
        lutjax.quantize({"up": {"kernel": jnp.ones((64, 8))}}, twice)
    both = Recipe((Rule("up/*", C), Rule("down/*", C), Rule("*/kernel", C), Rule("*", C)))
    assert match_rules(both, {"up": {"kernel": WEIGHT}, "down": {"kernel": WEIGHT}})


def test_rules_may_be_for_what_is_kept_only():
    recipe = Recipe((Rule("*/down/*", LutConfig(8)), Rule("*", LutConfig(4)))).with_embeddings(8)
    kept = ["embed_tokens/embedding", "0/down/kernel"]
    assert match_rules(recipe, {"up": jnp.ones((64, 8))}, kept)["up"].config.bits == 4
    with pytest.raises(ValueError, match="matches no parameter"):
        match_rules(recipe, {"up": jnp.ones((64, 8))}, kept[:1])


NAN = {"mlp": {"kernel": jnp.full((32, 16), jnp.nan)}}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LutConfig(bits=9), ValueError, "bits=9 is not supported; use 1 to 8"),
        (lambda: LutConfig(bits=2.0), ValueError, "bits=2.0"),
        (lambda: LutConfig(group_size=8), ValueError, "group_size=8.*at least 16"),
        (lambda: LutConfig(group_size="row"), ValueError, "group_size='row'.*'column'"),
        (lambda: LutConfig(codebook="nff"), ValueError, "unknown codebook 'nff'; use one of"),
        (lambda: LutConfig(codebook=(1.0, -1.0)), ValueError, "2 values, but bits=4 needs 16"),
        (lambda: LutConfig(bits=1, codebook="kmeans"), ValueError, "2 to 8 bits, not 1"),
        (lambda: LutConfig(bits=3, codebook="fp4"), ValueError, "'fp4' has 4 bits, not 3"),
        (lambda: LutConfig(scale_dtype="int8"), ValueError, "scale_dtype='int8'"),
        (lambda: LutConfig.higgs(4.5), ValueError, "bits=4.5 is not supported; use 1, 1.5, 2"),
        (lambda: LutConfig.higgs(0.5), ValueError, "bits=0.5 is not supported"),
        (lambda: LutConfig.higgs(group_size=48), ValueError, "group_size=48 cannot be rotated"),
        (lambda: LutConfig(group_size="column", rotate=True), ValueError, "'column' cannot be rot"),
        (lambda: LutConfig.higgs(float("nan")), ValueError, "bits=nan is not supported"),
        (
            lambda: LutConfig(codebook="nf", vector_size=2),
            ValueError,
            "vector_size=2 with codebook 'nf'",
        ),
        (lambda: LutConfig(True), ValueError, "bits=True is not supported; use 1 to 8"),
        (lambda: LutConfig(codebook=None), TypeError, "codebook=None; give a name, such as 'def"),
        (lambda: Recipe.uniform(codebook=None), TypeError, "codebook=None; give a name"),
        (
            lambda: LutConfig(codebook="gaussian", vector_size=2.0),
            ValueError,
            "vector_size=2.0 is not supported; use 1 or 2",
        ),
        (lambda: LutConfig(group_size=64, rotate="no"), ValueError, "rotate='no' must be true"),
        (
            lambda: lutjax.quantize(PARAMS, Recipe.higgs()),
            ValueError,
            "group_size=512 is larger than K=32 of .*; use a smaller group, say",
        ),
        (
            lambda: LutConfig(1, codebook="gaussian", vector_size=2),
            ValueError,
            "'gaussian' exists for 2 to 8 bits, not 1",
        ),
        (lambda: lutjax.DoubleQuant(bits=9), ValueError, "bits=9; use 1 to 8"),
        (lambda: lutjax.DoubleQuant(block=0), ValueError, "block=0"),
        (lambda: lutjax.DoubleQuant(dtype="int8"), ValueError, "'int8'"),
        (
            lambda: lutjax.quantize(PARAMS, Recipe((Rule("layers/0/up_proj/kernal", C),))),
            ValueError,
            "'layers/0/up_proj/kernal' matches no parameter; similar paths: layers/0/up_proj",
        ),
        (
            lambda: lutjax.quantize(PARAMS, bits=4, group_size=64),
            ValueError,
            "group_size=64 is larger than K=32 of 'layers/0/up_proj/kernel'.*axis=",
        ),
        (
            lambda: lutjax.quantize(PARAMS, Recipe((Rule("norm/scale", C),))),
            TypeError,
            "cannot quantize 'norm/scale': .*fewer than two axes",
        ),
        (
            lambda: lutjax.quantize(PARAMS, Recipe((Rule("steps", C),))),
            TypeError,
            "'steps': its dtype is int32",
        ),
        (
            lambda: lutjax.quantize(lutjax.quantize(jnp.ones((64, 8)))),
            TypeError,
            "compressed already",
        ),
        (lambda: lutjax.quantize(PARAMS, Recipe.uniform(), bits=3), TypeError, "recipe or bits"),
        (
            lambda: lutjax.quantize(NAN, bits=4, group_size=16),
            ValueError,
            "'mlp/kernel' has 512 NaN or infinite values",
        ),
        (
            lambda: lutjax.quantize(jnp.ones((4, 4)), Recipe((Rule("*", C, axis=2),))),
            ValueError,
            "axis=2 does not exist",
        ),
        (
            lambda: lutjax.quantize(jnp.ones((4, 4)), Recipe((Rule("*", C, batch_ndim=1),))),
            ValueError,
            "leave no matrix",
        ),
        (
            lambda: quantize_array(jnp.ones((4, 4)), Rule("*", None)),
            ValueError,
            "leaves 'array' dense",
        ),
        (lambda: lutjax.quantize(PARAMS, 4), TypeError, "the recipe is a int; give a Recipe"),
        (
            lambda: lutjax.quantize(PARAMS, C),
            TypeError,
            r'LutConfig; .* Recipe\(\(Rule\("\*", config',
        ),
        (lambda: lutjax.quantize(jnp.ones((64, 8)), Recipe(())), ValueError, "has no rules"),
        (lambda: Rule("w", 4), TypeError, "'w' has config=4; give a LutConfig"),
        (lambda: Rule(5, C), TypeError, "the pattern of a rule is 5"),
        (
            lambda: lutjax.quantize({"w": lutjax.quantize(jnp.ones((64, 8)))}, bits=2),
            TypeError,
            "cannot quantize 'w': it is compressed already",
        ),
        (
            lambda: lutjax.quantize({"w": jnp.ones((64, 0))}),
            ValueError,
            r"'w' of shape \(64, 0\) has no weights",
        ),
        (
            lambda: lutjax.quantize({"w": jnp.full((64, 8), 1e6)}, scale_dtype="float16"),
            ValueError,
            "a scale of 'w' overflows float16",
        ),
        (
            lambda: lutjax.quantize({"kernel": jnp.ones((64, 8, 16))}, group_size="column"),
            ValueError,
            r"'kernel' of shape \(64, 8, 16\) would be stacked matrices of 8 rows.*axis=-3",
        ),
        (
            lambda: lutjax.quantize({"kernel": jnp.ones((8, 128))}),
            ValueError,
            r"group_size=64 is larger than K=8 of 'kernel'.* dense with Rule\('kernel', None",
        ),
        (lambda: Recipe((("*", C),)), TypeError, r"is no rule; give Rule\(pattern, config\)"),
        (lambda: Recipe((), embeddings=8), TypeError, "embeddings=8; give a LutConfig or None"),
        (
            lambda: Recipe.from_json('{"rules": [], "embeddings": 8}'),
            ValueError,
            "not a recipe: it has no rules",
        ),
        (
            lambda: Recipe.from_json(
                '{"rules": [{"pattern": "*", "config": null}], "embeddings": 8}'
            ),
            ValueError,
            "not a recipe: 8 is no configuration such as",
        ),
        (
            lambda: lutjax.quantize(jnp.ones((64, 8)), bits=4, embedding_bits=8),
            ValueError,
            "a single array is no embedding; leave out embedding_bits",
        ),
        (
            lambda: lutjax.quantize({"embed_norm": {"w": jnp.ones(64)}}, embedding_bits=8),
            ValueError,
            "embeddings are to have 8 bits, but no parameter matches",
        ),
        (
            lambda: lutjax.quantize({"kernel": jnp.ones((64, 8))}, embedding_bits=8),
            ValueError,
            "embeddings are to have 8 bits, but no parameter matches",
        ),
        (lambda: Recipe.from_json('{"rules": []}'), ValueError, "it has no rules"),
        (lambda: Recipe.from_json("{}"), ValueError, "not a recipe: 'rules'"),
        (lambda: Recipe.from_json('{"rule": []}'), ValueError, "unknown key 'rule'"),
        (
            lambda: Recipe.from_json('{"rules": [{"pattern": "*", "config": {"bit": 4}}]}'),
            ValueError,
            "unknown key 'bit' of a LutConfig",
        ),
    ],
)
def test_errors_name_the_argument_and_the_fix(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_of_numpy_are_integers():
    assert LutConfig(np.int64(3), np.int32(32)) == LutConfig(3, 32)


def test_what_is_no_array_is_left_out_of_a_summary():
    trained, _ = lutjax.partition({"kernel": jnp.ones((4, 4)), "steps": jnp.ones(3, jnp.int32)})
    module = {"layer": trained, "key": jax.random.key(0), "activation": jax.nn.relu, "rate": 0.1}
    assert [leaf.path for leaf in lutjax.summarize(module).leaves] == ["layer/kernel", "rate"]


@pytest.mark.parametrize("codebook", ["nf", "affine"])
def test_groups_with_nan_stay_nan(codebook):
    weight = jnp.ones((64, 8)).at[3, 5].set(jnp.nan)
    found = np.isnan(
        lutjax.quantize(
            weight, bits=4, group_size=32, codebook=codebook, allow_nonfinite=True
        ).materialize()
    )
    assert found[:32, 5].all() and found.sum() == 32


def test_nonfinite_weights_may_be_let_through():
    array = lutjax.quantize(jnp.full((64, 8), jnp.inf), allow_nonfinite=True)
    assert array.shape == (64, 8)


def test_summary_counts_and_materialize_restores():
    compressed = lutjax.quantize(PARAMS, Recipe((Rule("*", C),)))
    summary = lutjax.summarize(compressed)
    assert summary.nbytes == sum(a.nbytes for a in jax.tree.leaves(compressed))
    assert summary.size == sum(a.size for a in jax.tree.leaves(PARAMS))
    assert summary.compressed.size == 32 * 16
    text = str(summary)
    assert "layers/0/up_proj/kernel" in text and "4 bits, group_size=16" in text
    dense = lutjax.materialize(compressed)
    assert jax.tree.structure(dense) == jax.tree.structure(PARAMS)
    assert lutjax.summarize(PARAMS).bits_per_weight == 32
    assert codebooks.is_affine(np.array([0.0, 1.0]))
