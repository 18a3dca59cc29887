"""Folding leaves a model's function as it is."""

import functools

import fold_cases
import jax
import jax.numpy as jnp
import linen_models
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.algorithms import apply_folds, ScaledArray
from jaxquant.intercept import find_folds, tie, trace
from jaxquant.intercept._variables import parameters


@functools.cache
def made(name):
    model, variables, args, apply = fold_cases.CASES[name][0]()
    return variables, args, jax.jit(apply), find_folds(trace(model, variables, *args))


def powers(fold, rng):
    """Powers of two, by which nothing is rounded."""
    return tie(np.exp2(rng.integers(-3, 4, fold.shape)).astype(np.float32), fold, largest=True)


FOLDED = [name for name, (_, lines) in fold_cases.CASES.items() if lines]


@pytest.mark.parametrize("name", FOLDED)
def test_powers_of_two_change_no_bit_of_the_result(name):
    variables, args, apply, folds = made(name)
    rng = np.random.default_rng(5)
    scaled = apply_folds(variables, [(fold, powers(fold, rng)) for fold in folds])
    before, after = parameters(variables), parameters(scaled)
    changed = {path for path in before if (before[path] != after[path]).any()}
    assert changed == {str(e.root.path) for f in folds for e in (*f.sources, *f.sites)}
    np.testing.assert_array_equal(apply(scaled, *args), apply(variables, *args))


@pytest.mark.parametrize("name", FOLDED)
def test_every_fold_matters_by_itself(name):
    """Without the weights of one site the result would be another: none is scaled for nothing."""
    variables, args, apply, folds = made(name)
    rng = np.random.default_rng(6)
    for fold in folds[:4]:
        s = powers(fold, rng)
        scaled = apply_folds(variables, [(fold, s)])
        np.testing.assert_array_equal(apply(scaled, *args), apply(variables, *args))
        kept, known = fold.sites[0].root.path, parameters(variables)
        half = jq.intercept.map_leaves(
            lambda path, x, kept=kept, known=known: known[path] if path == kept else x, scaled
        )
        assert (apply(half, *args) != apply(variables, *args)).any()


@pytest.mark.parametrize("case", [c for c in linen_models.CASES if not c.options()], ids=str)
def test_models_that_were_made_for_other_tests(case):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = case.model.init(rngs, *case.args)
    rng = np.random.default_rng(4)
    folds = find_folds(trace(case.model, variables, *case.args))
    scaled = apply_folds(variables, [(fold, powers(fold, rng)) for fold in folds])
    apply = jax.jit(case.model.apply)
    np.testing.assert_array_equal(apply(scaled, *case.args), apply(variables, *case.args))


def test_any_factors_change_the_result_by_rounding_only():
    variables, args, apply, folds = made("llama with biases")
    rng = np.random.default_rng(7)
    chosen = [tie(np.exp(rng.normal(size=f.shape)).astype(np.float32), f) for f in folds]
    scaled = apply_folds(variables, list(zip(folds, chosen, strict=True)))
    wanted, got = (np.asarray(apply(v, *args)) for v in (variables, scaled))
    # In float64 the two differ by 1e-12; float32 rounds each of about 50 operations in a row, and
    # sums of up to 64 products, to 6e-8.
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


class Lazy:
    """What a checkpoint hands out; counts how often it is read."""

    def __init__(self, array):
        self.array, self.reads = array, 0
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return self.array if dtype is None else self.array.astype(dtype)


@pytest.mark.parametrize("name", ["llama", "experts, scanned"])
def test_lazy_leaves_stay_lazy_and_give_the_same_numbers(name):
    variables, _, _, folds = made(name)
    rng = np.random.default_rng(8)
    chosen = [(fold, powers(fold, rng)) for fold in folds]
    lazy = jax.tree.map(lambda x: Lazy(np.asarray(x)), variables)
    scaled = apply_folds(lazy, chosen)
    wanted = parameters(apply_folds(variables, chosen))
    for path, leaf in parameters(scaled).items():
        held = leaf.of if isinstance(leaf, ScaledArray) else leaf
        assert held.reads == 0
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path])
    touched = {end.root.path for fold in folds for end in (*fold.sources, *fold.sites)}
    found = {p for p, x in parameters(scaled).items() if isinstance(x, ScaledArray)}
    assert found == touched


def test_a_scaled_array_has_the_interface_of_a_lazy_one():
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = ScaledArray(of=w, factors=(np.asarray([[2.0], [4.0]], np.float32),))
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes) == ((2, 3), np.float32, 2, 6, 24)
    np.testing.assert_array_equal(x.read(), [[0, 2, 4], [12, 16, 20]])
    assert np.asarray(x, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="Leave copy=False out"):
        np.asarray(x, copy=False)


def test_shapes_are_left_alone():
    variables, _, _, folds = made("llama")
    shapes = jax.eval_shape(lambda: variables)
    scaled = apply_folds(shapes, [(folds[0], np.ones(32, np.float32))])
    assert jax.tree.leaves(scaled) == jax.tree.leaves(shapes)


def test_narrow_parameters_keep_their_dtype_and_are_rounded_once():
    variables, _, _, folds = made("linear to linear")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    s = np.exp(np.random.default_rng(9).normal(size=8)).astype(np.float32)
    scaled = parameters(apply_folds(narrow, [(folds[0], s)]))
    w = np.asarray(parameters(narrow)["b/kernel"]).astype(np.float32)
    wanted = (w * s[:, None]).astype(ml_dtypes.bfloat16)
    assert scaled["b/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(scaled["b/kernel"]), wanted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_stay(kind):
    variables, _, _, folds = made("linear to linear")
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    spread = NamedSharding(mesh, PartitionSpec("x", "y"))
    held = jq.intercept.map_leaves(
        lambda path, x: jax.device_put(x, spread) if x.ndim == 2 else x, variables
    )
    chosen = [(folds[0], powers(folds[0], np.random.default_rng(1)))]
    wanted = parameters(apply_folds(variables, chosen))
    for path, leaf in parameters(apply_folds(held, chosen)).items():
        if leaf.ndim == 2:
            assert leaf.sharding.is_equivalent_to(spread, 2)
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path])


def test_factors_that_do_not_fit_are_refused():
    variables, _, _, folds = made("llama")
    norm, shared = folds[0], folds[1]
    s = np.exp(np.random.default_rng(2).normal(size=64)).astype(np.float32)
    with pytest.raises(ValueError, match=r"factor 16 is .* Give tie\(s, fold\)"):
        apply_folds(variables, [(shared, s)])
    with pytest.raises(ValueError, match="scaled by two folds"):
        apply_folds(variables, [(norm, np.ones(32)), (norm, np.ones(32))])
    with pytest.raises(ValueError, match="not among the 0 parameters"):
        apply_folds(nnx.State({}), [(norm, np.ones(32))])


def test_quantized_parameters_are_refused():
    model, variables, args, _ = fold_cases.CASES["linear to linear"][0]()
    folds = find_folds(trace(model, variables, *args))
    int8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
    recipe = jq.Recipe(name="all", rules=(jq.Rule(match="*", weights=int8),))
    plan = jq.plan(model, variables, *args, recipe=recipe)
    with pytest.raises(ValueError, match="Fold first, then quantize"):
        apply_folds(jq.quantize(variables, plan), [(folds[0], np.ones(8))])
