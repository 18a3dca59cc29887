"""Scalings: the model stays the same function, and its codes get better."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import nnx
from fold_cases import linen, SIZES
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, scaling_losses, SmoothQuant
from jaxquant.algorithms._fold_apply import ScaledArray
from jaxquant.calibrate import calibrate, Settings, token_batches
from jaxquant.calibrate._scaling import inspected, Scaling
from jaxquant.calibrate._segments import cut, marked
from jaxquant.calibrate._store import Store
from jaxquant.intercept import find_folds, trace
from jaxquant.intercept._variables import map_leaves, parameters
from jaxquant.models import Bert, BertConfig, Llama

G8 = jq.Scheme(values=jq.formats.INT3, tile=jq.Tile(contracted=8))
W8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
A8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
FEW = AWQ(ratios=6)


def uneven(variables):
    """Norms whose channels differ by far, as those of trained models do."""
    rng = np.random.default_rng(7)

    def one(path, leaf):
        if "norm" not in path.lower() or not path.endswith("scale"):
            return leaf
        return leaf * jnp.asarray(np.exp(rng.normal(size=leaf.shape)).astype(np.float32))

    return map_leaves(one, variables)


@functools.cache
def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (6, 8))
    batches = token_batches(tokens, LLAMA.vocab_size, size=3)
    return model, uneven(state), batches, lambda s, *args: nnx.merge(graphdef, s)(*args)


@functools.cache
def decoder():
    model = moe.Decoder(scanned=True)
    tokens = np.random.default_rng(0).integers(0, moe.VOCABULARY, (4, 8))
    variables = uneven(model.init(jax.random.key(0), moe.TOKENS))
    return model, variables, token_batches(tokens, moe.VOCABULARY, size=2), model.apply


@functools.cache
def bert():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 8)), jnp.int32)
    model, variables, args, apply = linen(
        Bert(BertConfig(token_types=2, **SIZES)), tokens, tokens > 24
    )
    return model, variables, [args], apply


MODELS = {"llama": llama, "experts": decoder, "bert": bert}
LEAVE = (jq.Rule(match="*embed*", optional=True), jq.Rule(match="*router*", optional=True))


def planned(case, *rules, leave=LEAVE):
    model, variables, batches, _ = case
    recipe = jq.Recipe(name="test", rules=(*leave, *rules))
    return jq.plan(model, variables, *batches[0], recipe=recipe)


@functools.cache
def scaled(name, way, **rule):
    """The variables with factors folded in, and what chose them."""
    case = MODELS[name]()
    model, variables, batches, _ = case
    activations = A8 if isinstance(way, SmoothQuant) else None
    weights = G8 if activations is None else W8
    rules = jq.Rule(match="*", weights=weights, activations=activations, scaling=way)
    plan = planned(case, rules)
    with Store(1 << 30) as store:
        scaling = Scaling(plan, model, variables, batches, store, Settings())
        after = scaling.run()
        assert store.held == 0
    return scaling, after


WAYS = {"awq": FEW, "smoothquant": SmoothQuant(), "searched": SmoothQuant(alpha=None, ratios=3)}


@pytest.mark.parametrize("way", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_computes_what_it_did(name, way):
    _, variables, batches, apply = MODELS[name]()
    scaling, after = scaled(name, WAYS[way])
    wanted, got = (np.asarray(apply(v, *batches[0])) for v in (variables, after))
    # Each weight is rounded once more, and sums of up to 64 products are of other numbers.
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4 * np.abs(wanted).max())
    assert scaling.chosen
    changed = sum(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(after), strict=True)
    )
    assert changed >= 2
    assert jax.tree.structure(variables) == jax.tree.structure(after)


@pytest.mark.parametrize("name", MODELS)
def test_a_scaling_that_is_chosen_by_a_loss_is_never_worse_than_none(name):
    scaling, _ = scaled(name, FEW)
    assert len(scaling.rows) == len(scaling.chosen)
    for row in scaling.rows:
        assert row.loss <= row.plain_loss
    if name != "bert":
        total = sum(row.loss for row in scaling.rows), sum(row.plain_loss for row in scaling.rows)
        assert total[0] < 0.95 * total[1]


def test_losses_without_a_block_are_those_of_the_gram_matrix():
    model, variables, batches, _ = bert()
    scaling, _ = scaled("bert", FEW)
    gram = jq.observe(model, variables, batches, observers=(jq.observers.Gram(),))
    known = parameters(variables)
    # Values make the only input that can be scaled, and the output projection is the whole of it.
    assert [row.fold for row in scaling.rows] == [
        f"layers_{i}/value/{{bias,kernel}} -> layers_{i}/out/kernel" for i in range(2)
    ]
    for row, (_, s) in zip(scaling.rows, scaling.chosen, strict=True):
        (site,) = row.sites
        kernel = known[site.removesuffix("#dot")]
        w = kernel.reshape(-1, kernel.shape[-1]).T
        each = jnp.stack([jnp.ones(s.size), jnp.asarray(s).reshape(-1)])
        losses = scaling_losses(each, [w], gram[site]["gram"], [G8])
        np.testing.assert_allclose(losses, [row.plain_loss, row.loss], rtol=1e-3)


def segments(name):
    model, variables, batches, _ = MODELS[name]()
    graph = trace(model, variables, *batches[0])
    return cut(graph, lambda mark: "embed" not in mark.root.path)


def inspected_by(found):
    if found is None:
        return None
    part, outputs = found
    return [
        marked(step).root.path.split("/")[-2]
        for step in part.steps
        if step.mark is not None and step.outputs[0] in outputs
    ]


def test_a_group_is_judged_by_the_output_of_its_module():
    made = segments("llama")
    found = [inspected_by(inspected(made, i, s.sites)) for i, s in enumerate(made)]
    assert found == [["o"], None, ["down"], None] * LLAMA.layers


def test_what_is_inspected_has_nothing_of_other_modules():
    made = segments("llama")
    part, outputs = inspected(made, 2, made[2].sites)
    paths = [marked(s).root.path.split("/")[-2] for s in part.steps if s.mark is not None]
    assert paths == ["gate", "up", "down"]
    assert part.outputs == outputs
    assert len(outputs) == 1


def test_query_heads_that_share_a_value_head_are_scaled_alike():
    scaling, _ = scaled("llama", FEW)
    (fold, s) = next(x for x in scaling.chosen if "attention/o/" in str(x[0]))
    assert fold.channels is not None
    heads = np.asarray(s).reshape(LLAMA.kv_heads, -1, LLAMA.head_dim)
    assert heads.shape[1] == 2
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert len(np.unique(s)) > 1


def peaks_of(variables, name, site):
    """The largest magnitudes of a site's inputs."""
    model, _, batches, _ = MODELS[name]()
    return np.asarray(
        jq.observe(model, variables, batches, observers=(jq.observers.Peak(),))[site]["peak"]
    )


def test_alpha_1_makes_inputs_peak_at_1():
    _, after = scaled("llama", SmoothQuant(alpha=1.0))
    for i in range(LLAMA.layers):
        peaks = peaks_of(after, "llama", f"layers/{i}/mlp/up/kernel#dot")
        np.testing.assert_allclose(peaks, 1, rtol=1e-4)


def test_alpha_0_makes_columns_of_all_weights_peak_at_1():
    scaling, after = scaled("llama", SmoothQuant(alpha=0.0))
    known = parameters(after)
    for i in range(LLAMA.layers):
        # Keys and queries are divided for nothing else, and values are for the output projection.
        q, k = (np.abs(known[f"layers/{i}/attention/{x}/kernel"]) for x in "qk")
        (v,) = (
            np.abs(parameters(llama()[1])[f"layers/{i}/attention/v/kernel"])
            * np.asarray(s)[:, None]
            for fold, s in scaling.chosen
            if f"layers/{i}/attention/{{q,k,v}}" in str(fold)
        )
        widest = np.maximum(np.maximum(_columns(q), _columns(k)), _columns(v))
        np.testing.assert_allclose(widest, 1, rtol=1e-4)


def _columns(w):
    return w.reshape(LLAMA.width, -1).max(axis=1)


def test_alphas_are_searched_for_each_group():
    scaling, _ = scaled("llama", WAYS["searched"])
    for row in scaling.rows:
        assert row.loss <= row.plain_loss
    fixed, _ = scaled("llama", SmoothQuant())
    assert all(row.loss is None and row.plain_loss is None for row in fixed.rows)


def test_sites_whose_inputs_nothing_makes_are_named_and_left():
    case = bert()
    model, variables, batches, _ = case
    plan = planned(case, jq.Rule(match="*", weights=G8, scaling=FEW))
    made = calibrate(model, variables, batches, plan)
    ones = {row.sites[0].removesuffix("#dot") for row in made.scalings}
    assert ones == {f"layers_{i}/out/kernel" for i in range(2)}
    assert set(made.unscaled) == {
        s.path for s in plan.sites if s.scaling is not None and s.path not in ones
    }
    plain = parameters(jq.quantize(variables, planned(case, jq.Rule(match="*", weights=G8))))
    got = parameters(made.qvariables)
    gained = [f"layers_{i}/" for i, row in enumerate(made.scalings) if row.loss < row.plain_loss]
    # Left as they are, but for values where factors were taken.
    for path in made.unscaled:
        same = np.array_equal(np.asarray(got[path].scale), np.asarray(plain[path].scale))
        takes = "value" in path and path.startswith(tuple(gained))
        assert same != takes, path


def test_one_input_cannot_be_scaled_in_two_ways():
    case = llama()
    rules = (
        jq.Rule(match="*gate*", weights=G8, scaling=FEW),
        jq.Rule(match="*", weights=G8, scaling=AWQ(ratios=8)),
    )
    plan = planned(case, *rules)
    with pytest.raises(jq.PlanError, match="gate/kernel, layers/0/mlp/up/kernel read one input"):
        calibrate(*case[:3], plan)


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_scaling_and_gptq_go_together(name):
    case = MODELS[name]()
    model, variables, batches, apply = case
    rules = {
        way: jq.Rule(match="*", weights=G8, scaling=s, algorithm=a)
        for way, s, a in (("both", FEW, GPTQ()), ("plain", None, None))
    }
    plan = planned(case, rules["both"])
    told = []
    made = calibrate(model, variables, batches, plan, progress=lambda row, *_: told.append(row))
    assert told == [*made.scalings, *made.sites]
    assert not made.unscaled
    plain_plan = planned(case, rules["plain"])
    plain = jq.quantize(variables, plain_plan)
    wanted = np.asarray(apply(variables, *batches[0]))

    def error(plan, qvariables):
        wrapped = jq.wrap(model, plan, qvariables) if name == "llama" else jq.wrap(model, plan)
        args = batches[0] if name == "llama" else (qvariables, *batches[0])
        out = wrapped(*args) if name == "llama" else wrapped.apply(*args)
        return np.square(np.asarray(out) - wanted).sum()

    assert error(plan, made.qvariables) < 0.7 * error(plain_plan, plain)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "name, way", [("llama", FEW), ("experts", FEW), ("llama", SmoothQuant(unfolded=True))]
)
@pytest.mark.parametrize("after", [1, 4])
def test_factors_that_were_chosen_are_kept_by_a_run_that_stops(tmp_path, name, way, after):
    case = MODELS[name]()
    model, variables, batches, _ = case
    plan = planned(case, jq.Rule(match="*", weights=G8, scaling=way))
    whole = calibrate(model, variables, batches, plan)
    told = []

    def stop(row, level, levels):
        told.append((level, row))
        if len(told) > after:
            raise Stop

    with pytest.raises(Stop):
        calibrate(model, variables, batches, plan, out=tmp_path / "run", progress=stop)
    # The level that was being done when it stopped is done again.
    kept = [row for level, row in told if level < told[-1][0]]
    again = []
    made = calibrate(
        model,
        variables,
        batches,
        plan,
        out=tmp_path / "run",
        resume=True,
        progress=lambda row, *_: again.append(row),
    )
    assert len(again) == len(whole.scalings) + len(whole.sites) - len(kept)
    assert [row.fold for row in made.scalings] == [row.fold for row in whole.scalings]
    assert made.scalings[: len(kept)] == tuple(kept)
    for a, b in zip(*map(jax.tree.leaves, (made.qvariables, whole.qvariables)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read when it is asked for, and counts how often."""

    held: np.ndarray
    reads: list

    shape = property(lambda self: self.held.shape)
    dtype = property(lambda self: self.held.dtype)

    def __array__(self, dtype=None, copy=None):
        self.reads.append(1)
        return self.held if dtype is None else self.held.astype(dtype)


def test_lazily_loaded_leaves_are_scaled_when_they_are_read():
    model, variables, batches, _ = decoder()
    reads = []
    lazy = jax.tree.map(lambda x: Lazy(np.asarray(x), reads), variables)
    plan = planned(decoder(), jq.Rule(match="*", weights=G8, scaling=SmoothQuant(), activations=A8))
    with Store(1 << 30) as store:
        after = Scaling(plan, model, lazy, batches, store, Settings()).run()
    leaves = jax.tree.leaves(after)
    assert any(isinstance(x, ScaledArray) for x in leaves)
    assert all(isinstance(x, (ScaledArray, Lazy)) for x in leaves)
    count = len(reads)
    with Store(1 << 30) as store:
        wanted = Scaling(plan, model, variables, batches, store, Settings()).run()
    assert len(reads) == count
    for a, b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-6)


def test_every_fold_of_scaled_sites_is_used_once():
    model, variables, batches, _ = decoder()
    scaling, _ = scaled("experts", FEW)
    folds = {str(f) for f in find_folds(trace(model, variables, *batches[0]))}
    chosen = [str(fold) for fold, _ in scaling.chosen]
    assert len(chosen) == len(set(chosen)) == len(folds)
    assert set(chosen) == folds


def test_a_router_takes_the_factors_that_its_experts_choose():
    case = decoder()
    model, variables, batches, apply = case
    rule = jq.Rule(match="*", weights=G8, scaling=FEW)
    plan = planned(case, rule, leave=LEAVE[:1])
    with Store(1 << 30) as store:
        scaling = Scaling(plan, model, variables, batches, store, Settings())
        after = scaling.run()
    assert not scaling.without_fold
    shared = [row for row in scaling.rows if "router" in row.fold]
    assert [row.sites for row in shared] == [("layers/experts/up#ragged_dot",)] * moe.LAYERS
    # One factor for all experts, and one each for what only one expert reads.
    shapes = [np.shape(s) for fold, s in scaling.chosen if "experts" in str(fold)]
    assert shapes == [(moe.D,), (moe.EXPERTS, moe.HIDDEN)] * moe.LAYERS
    wanted, got = (np.asarray(apply(v, *batches[0])) for v in (variables, after))
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4 * np.abs(wanted).max())


def test_alphas_of_experts_cannot_be_searched():
    case = decoder()
    rule = jq.Rule(match="*experts*", weights=W8, activations=A8, scaling=WAYS["searched"])
    plan = planned(case, rule, jq.Rule(match="*"))
    with pytest.raises(jq.PlanError, match="experts/up#ragged_dot holds several weights side by"):
        calibrate(*case[:3], plan)
