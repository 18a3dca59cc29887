"""What calibration leaves beside the codes: static scales, permutations, original outliers."""

import functools

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import (
    GPTQ,
    HQQ,
    Order,
    RangeSearch,
    static_observers,
    static_scale,
)
from jaxquant.calibrate import calibrate, Inputs, Settings, token_batches
from jaxquant.calibrate._driver import block_of
from jaxquant.intercept import Root
from jaxquant.intercept._variables import map_leaves, parameters, states_of
from jaxquant.models import Llama
from jaxquant.ops import Outliers, OutlierWeights
from jaxquant.qarray import dequantize, QArray

G8 = jq.Scheme(values=jq.formats.INT3, tile=jq.Tile(contracted=8))
G8_ZERO = jq.Scheme(
    values=jq.formats.UINT3,
    tile=jq.Tile(contracted=8),
    range=jq.MinMax(),
    zero_point=jq.FLOAT16,
)
W8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
A8 = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
A8_ZERO = jq.Scheme(
    values=jq.INT8, tile=jq.PER_TENSOR, range=jq.MinMax(), zero_point=jq.formats.INT8
)
A8_TOKEN = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
FLOAT = Settings(inputs=Inputs.FLOAT)


@functools.cache
def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (6, 8))
    return model, nnx.state(model), token_batches(tokens, LLAMA.vocab_size, size=3)


@functools.cache
def decoder():
    model = moe.Decoder(scanned=True)
    tokens = np.random.default_rng(0).integers(0, moe.VOCABULARY, (4, 8))
    variables = model.init(jax.random.key(0), moe.TOKENS)
    return model, variables, token_batches(tokens, moe.VOCABULARY, size=2)


def planned(case, *rules):
    model, variables, batches = case
    left = (jq.Rule(match="*embed*", optional=True), jq.Rule(match="*router*", optional=True))
    recipe = jq.Recipe(name="test", rules=(*left, *rules))
    return jq.plan(model, variables, *batches[0], recipe=recipe)


def run(case, *rules, **options):
    plan = planned(case, *rules)
    return plan, calibrate(*case, plan, **options)


STATIC = {
    "symmetric": jq.Rule(match="*", weights=W8, activations=A8, static=True),
    "zero points": jq.Rule(match="*", weights=W8, activations=A8_ZERO, static=True),
}


@functools.cache
def static(name):
    return run(llama(), STATIC[name], settings=FLOAT)


@pytest.mark.parametrize("name", STATIC)
def test_static_scales_are_those_of_what_was_observed(name):
    model, variables, batches = llama()
    plan, made = static(name)
    scheme = STATIC[name].activations
    seen = jq.observe(model, variables, batches, observers=static_observers(scheme))
    states = states_of(made.qvariables)
    assert set(states) == {s.site for s in plan.sites if s.static}
    for site, state in states.items():
        k = inputs_of(plan, site)
        wanted = static_scale(scheme, seen[site], stack=(), k=k)
        assert set(state) == set(wanted)
        # Ranges of the same numbers, computed by parts of the model that were compiled apart.
        np.testing.assert_allclose(state["scale"], wanted["scale"], rtol=1e-5)
        for a, b in ((state[x], wanted[x]) for x in wanted if x == "zero_point"):
            assert np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max() <= 1


def inputs_of(plan, site):
    leaf = plan.by_path[plan.by_site[site].path]
    return int(np.prod([leaf.shape[a] for a in leaf.contracted]))


@pytest.mark.parametrize("name", STATIC)
def test_a_model_with_static_scales_computes_almost_what_the_float_model_does(name):
    model, _, batches = llama()
    plan, made = static(name)
    got = np.asarray(jq.wrap(model, plan, made.qvariables)(*batches[0]))
    wanted = np.asarray(model(*batches[0]))
    error = np.square(got - wanted).sum() / np.square(wanted).sum()
    # Eight bits: half a step of 1/127 or less on both sides of some 14 products.
    assert 0 < error < 1e-2


def test_a_static_scale_is_of_all_batches():
    model, variables, batches = llama()
    plan = planned(llama(), STATIC["symmetric"])
    each = [
        states_of(calibrate(model, variables, [b], plan, settings=FLOAT).qvariables)
        for b in batches
    ]
    for site, state in states_of(static("symmetric")[1].qvariables).items():
        widest = np.maximum(*(np.asarray(s[site]["scale"]) for s in each))
        np.testing.assert_allclose(state["scale"], widest, rtol=1e-5)


def test_scanned_layers_have_a_static_scale_each():
    model, variables, batches = decoder()
    rules = (
        jq.Rule(match="*experts*"),
        jq.Rule(match="*", weights=W8, activations=A8, static=True),
    )
    plan, made = run(decoder(), *rules, settings=FLOAT)
    states = states_of(made.qvariables)
    seen = jq.observe(model, variables, batches, observers=static_observers(A8))
    assert set(states) == {
        f"layers/attention/{x}/kernel#dot" for x in ("query", "key", "value")
    } | {"layers/attention/out/kernel#dot"}
    for site, state in states.items():
        assert state["scale"].shape == (moe.LAYERS, 1)
        assert len(set(np.asarray(state["scale"]).ravel().tolist())) == moe.LAYERS
        ends = seen[site]["extremes"]
        peak = jnp.maximum(-ends["low"], ends["high"]).max(axis=-1)
        np.testing.assert_allclose(state["scale"][:, 0], peak / 127, rtol=1e-5)
    out = jq.wrap(model, plan).apply(made.qvariables, *batches[0])
    wanted = model.apply(variables, *batches[0])
    assert float(jnp.square(out - wanted).sum() / jnp.square(wanted).sum()) < 1e-2


def test_original_outliers_are_columns_of_the_weight():
    model, variables, batches = llama()
    # A threshold that some channels of this model's inputs reach.
    outliers = Outliers(threshold=2.5, weights=OutlierWeights.ORIGINAL)
    rule = jq.Rule(match="*", weights=W8, activations=A8_TOKEN, outliers=outliers)
    plan, made = run(llama(), rule, settings=FLOAT)
    seen = jq.observe(model, variables, batches, observers=(jq.observers.Peak(),))
    known, found = parameters(variables), 0
    states = states_of(made.qvariables)
    assert set(states) == {s.site for s in plan.sites if s.outliers is not None}
    for site, state in states.items():
        path = plan.by_site[site].path
        columns = np.asarray(state["outlier_columns"])
        peak = np.asarray(seen[site]["peak"])
        real = columns[columns < len(peak)]
        assert set(real) == set(np.flatnonzero(peak >= 2.5))
        found += len(real)
        w = np.asarray(known[path]).reshape(len(peak), -1)
        np.testing.assert_array_equal(state["outlier_weights"][: len(real)], w[real])
    assert found > 5
    out, wanted = jq.wrap(model, plan, made.qvariables)(*batches[0]), model(*batches[0])
    assert float(jnp.square(out - wanted).sum() / jnp.square(wanted).sum()) < 1e-2


@functools.cache
def permuted():
    rule = jq.Rule(match="*", weights=G8, algorithm=GPTQ(order=Order.DESCENDING))
    return run(llama(), rule)


def effective(qvariables):
    """The tree with what its codes stand for in place, columns in the order of the model."""
    states = states_of(qvariables)

    def one(path, leaf):
        if not isinstance(leaf, QArray):
            return leaf
        w = np.asarray(dequantize(leaf))
        (own,) = [s for site, s in states.items() if site.rpartition("#")[0] == path] or [{}]
        if "permutation" in own:
            k = own["permutation"].shape[-1]
            whole = w.reshape(k, -1)
            back = np.empty_like(whole)
            back[np.asarray(own["permutation"])] = whole
            w = back.reshape(w.shape)
        return jnp.asarray(w)

    return map_leaves(one, qvariables)


def test_a_model_with_permuted_inputs_computes_what_its_weights_do():
    model, variables, batches = llama()
    plan, made = permuted()
    states = states_of(made.qvariables)
    assert set(states) == {s.site for s in plan.sites if s.algorithm is not None}
    for state in states.values():
        order = np.asarray(state["permutation"])
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
        assert not np.array_equal(order, np.arange(len(order)))
    got = jq.wrap(model, plan, made.qvariables)(*batches[0])
    held = parameters(effective(made.qvariables))
    floats = map_leaves(lambda path, leaf: held.get(path, leaf), variables)
    wanted = nnx.merge(nnx.graphdef(model), floats)(*batches[0])
    # Float32 sums of up to 64 terms in another order, through two layers.
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    plain = np.asarray(model(*batches[0]))
    assert np.abs(got - plain).max() > 1e-2


def test_the_account_measures_what_permuted_codes_stand_for():
    variables, (_, made) = parameters(llama()[1]), permuted()
    held = parameters(effective(made.qvariables))
    assert made.account.errors
    for path, error in made.account.errors:
        w = np.asarray(variables[path], np.float64)
        wanted = np.linalg.norm(np.asarray(held[path], np.float64) - w) / np.linalg.norm(w)
        assert error.relative == pytest.approx(wanted, rel=1e-4)


def test_errors_of_permuted_codes_are_less_than_those_of_rounding():
    for row in permuted()[1].sites:
        assert row.error < row.nearest_error


def same(a, b):
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(left, right, strict=True)
    )


class Stop(Exception):
    pass


def test_state_comes_back_when_a_calibration_goes_on(tmp_path):
    rule = jq.Rule(
        match="*",
        weights=G8,
        activations=A8_ZERO,
        static=True,
        algorithm=GPTQ(order=Order.DESCENDING),
    )
    plan, wanted = run(llama(), rule)

    def stop(row, level, levels):
        if level == 4:
            raise Stop

    with pytest.raises(Stop):
        calibrate(*llama(), plan, out=tmp_path / "run", progress=stop)
    made = calibrate(*llama(), plan, out=tmp_path / "run", resume=True)
    states = states_of(made.qvariables)
    names = {"scale", "zero_point", "permutation"}
    assert all(set(state) == names for state in states.values())
    assert same(states, states_of(wanted.qvariables))
    assert same(made.qvariables, wanted.qvariables)


@pytest.mark.parametrize(
    "free",
    [
        jq.Rule(match="*mlp*", weights=G8_ZERO, algorithm=HQQ()),
        jq.Rule(match="*mlp*", weights=G8),
    ],
    ids=["hqq", "nearest"],
)
def test_sites_that_need_no_data_are_quantized_as_without_any(free):
    model, variables, batches = llama()
    plan, made = run(llama(), free, jq.Rule(match="*", weights=G8, algorithm=GPTQ()))
    other = jq.plan(
        model,
        variables,
        *batches[0],
        recipe=jq.Recipe(name="free", rules=(free, jq.Rule(match="*"))),
    )
    wanted = parameters(jq.quantize(variables, other))
    got = parameters(made.qvariables)
    mlp = [path for path in got if "mlp/" in path]
    assert len(mlp) == 3 * LLAMA.layers
    assert all(isinstance(got[path], QArray) and same(got[path], wanted[path]) for path in mlp)
    assert {row.root for row in made.sites} == {
        f"layers/{i}/attention/{x}/kernel" for i in range(LLAMA.layers) for x in "qkvo"
    }


def test_experts_get_codes_of_their_own():
    rules = (jq.Rule(match="*experts*", weights=G8, algorithm=GPTQ()), jq.Rule(match="*"))
    plan, made = run(decoder(), *rules)
    assert [row.root for row in made.sites] == [
        f"layers/experts/{x}[{i}]" for i in range(moe.LAYERS) for x in ("up", "down")
    ]
    assert all(row.error < row.nearest_error for row in made.sites)
    # Each token counts once for each expert that it was dealt to.
    assert all(row.rows == 4 * 8 * moe.CHOSEN for row in made.sites)


@pytest.mark.parametrize(
    ("root", "block"),
    [
        (Root(path="layers/3/mlp/up/kernel", steps=()), "layers/3"),
        (Root(path="layers_12/query/kernel", steps=()), "layers_12"),
        (Root(path="params/head/kernel", steps=()), "params"),
        (Root(path="head", steps=()), "head"),
        (Root(path="layers/up/kernel", steps=((0, 2),)), "layers[2]"),
        (Root(path="outer/w", steps=((0, 1), (2, 3))), "outer[1,3]"),
    ],
)
def test_the_block_of_a_root(root, block):
    assert block_of(root) == block


@pytest.mark.parametrize("data_free", [False, True])
def test_a_scheme_that_an_algorithm_refuses_is_an_error_naming_the_parameter(data_free):
    model, variables, batches = llama()
    rule = jq.Rule(
        match="*",
        weights=G8 if data_free else jq.schemes.NVFP4,
        algorithm=HQQ() if data_free else GPTQ(search=RangeSearch()),
    )
    plan = planned(llama(), rule)
    if data_free:
        with pytest.raises(ValueError, match="^layers/0/attention/k/kernel: HQQ finds zero points"):
            jq.quantize(variables, plan)
    else:
        with pytest.raises(
            ValueError, match=r"^layers/0/.*/kernel by '\*': A range search chooses"
        ):
            calibrate(model, variables, batches, plan)


def test_experts_take_their_inputs_as_they_come():
    rule = jq.Rule(match="*", weights=G8, algorithm=GPTQ(order=Order.DESCENDING))
    with pytest.raises(jq.PlanError, match=r"experts/.* is no dot, and only dots take"):
        run(decoder(), rule, settings=Settings(least_share=0.0))
