"""Levels against `jq.observe`, which runs the whole model at once."""

import functools

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import linen as nn, nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.calibrate import token_batches
from jaxquant.calibrate._compiled import Programs
from jaxquant.calibrate._roots import root_array
from jaxquant.calibrate._segments import marked
from jaxquant.calibrate._store import Store
from jaxquant.calibrate._walk import Walk
from jaxquant.models import Llama

OBSERVERS = (jq.observers.Moments(), jq.observers.Peak(), jq.observers.Gram())


@functools.cache
def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (7, 8))
    # The last batch is shorter than the others.
    batches = [(jnp.asarray(tokens[i : i + 3]),) for i in (0, 3, 6)]
    return model, nnx.state(model), batches


@functools.cache
def decoder():
    model = moe.Decoder(scanned=True)
    tokens = np.random.default_rng(0).integers(0, moe.VOCABULARY, (4, 8))
    variables = model.init(jax.random.key(0), moe.TOKENS)
    return model, variables, token_batches(tokens, moe.VOCABULARY, size=2)


MODELS = {"llama": llama, "scanned experts": decoder}


def walk(case, store, *, observers=OBSERVERS, wanted=lambda mark: "embed" not in mark.root.path):
    def effective(root):
        return root_array(made.known, root)

    made = Walk(
        *case,
        store,
        Programs(),
        wanted=wanted,
        observers=lambda mark: observers,
        effective=effective,
    )
    return made


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_whole_model(name):
    case = MODELS[name]()
    wanted = jq.observe(*case, observers=OBSERVERS)
    seen = set()
    with Store(1 << 30) as store:
        for _, segment, statistics in walk(case, store).levels():
            assert set(statistics) == {id(step) for step in segment.sites}
            for step in segment.sites:
                mark = marked(step)
                index = tuple(i for _, i in mark.root.steps)
                seen.add((mark.site, index))
                for observer in OBSERVERS:
                    theirs = jax.tree.map(lambda x, i=index: x[i], wanted[mark.site][observer.name])
                    for a, b in zip(
                        jax.tree.leaves(statistics[id(step)][observer.name]),
                        jax.tree.leaves(theirs),
                        strict=True,
                    ):
                        # Sums of at most 56 rows in another order; relative to the largest.
                        top = float(jnp.abs(b).max())
                        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * top)
    assert {site for site, _ in seen} == {site for site in wanted if "embed" not in site}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_in_the_store(name):
    model, variables, batches = MODELS[name]()
    with Store(1 << 30) as store:
        held = []
        for _ in walk((model, variables, batches), store).levels():
            held.append(store.held)
        assert store.held == 0
        assert not store._arrays and not store._files
    # A few activations of one layer, and not those of all.
    assert max(held[len(held) // 2 :]) <= max(held[: len(held) // 2])


def test_levels_that_are_not_watched_are_run_all_the_same():
    case = llama()
    with Store(1 << 30) as store:
        all_of_them = {i: s for i, _, s in walk(case, store).levels()}
    with Store(1 << 30) as store:
        some = {i: s for i, _, s in walk(case, store).levels(lambda index: index == 5)}
    assert [i for i, s in some.items() if s] == [5]
    for a, b in zip(some[5].values(), all_of_them[5].values(), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sites_that_read_one_value_share_its_statistics():
    with Store(1 << 30) as store:
        _, segment, statistics = next(iter(walk(llama(), store).levels()))
    assert [marked(s).root.path.split("/")[-2] for s in segment.sites] == ["q", "k", "v"]
    q, k, v = (statistics[id(step)] for step in segment.sites)
    assert q is k is v
    assert int(q["count"]["rows"]) == 7 * 8


def test_what_equations_read_is_asked_anew_for_each_level():
    model, variables, batches = llama()
    asked = []

    def effective(root):
        asked.append((level[0], root.path))
        # Queries of the first layer are 0 once they are asked for.
        array = root_array(made.known, root)
        return array * 0 if root.path == "layers/0/attention/v/kernel" else array

    level = [0]
    with Store(1 << 30) as store:
        made = Walk(
            model,
            variables,
            batches,
            store,
            Programs(),
            wanted=lambda mark: "embed" not in mark.root.path,
            observers=lambda mark: (jq.observers.Peak(),),
            effective=effective,
        )
        peaks = []
        for index, segment, statistics in made.levels():
            peaks.append(float(statistics[id(segment.sites[0])]["peak"].max()))
            level[0] = index + 1
    # Without values the output projection sees nothing; the rest goes on.
    assert peaks[1] == 0
    assert all(peak > 0 for i, peak in enumerate(peaks) if i != 1)
    assert (1, "layers/0/attention/v/kernel") in asked
    # Once for each shape of the batches.
    assert {at for at, path in asked if path == "layers/0/attention/v/kernel"} == {1}


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="before")(x)
        kernel = self.param("kernel", nn.initializers.normal(), (8, 8))
        return jax.lax.cond(x.sum() > 0, lambda: x @ kernel, lambda: x)


def test_sites_that_the_call_does_not_reach_are_named():
    x = jnp.ones((2, 8))
    model = Branch()
    case = (model, model.init(jax.random.key(0), x), [(x,)])
    with Store(1 << 30) as store:
        made = walk(case, store, wanted=lambda mark: True)
        made.check_reached({"before/kernel#dot": "before/kernel"})
        with pytest.raises(jq.PlanError, match="kernel#dot cannot be calibrated: cond"):
            made.check_reached({"kernel#dot": "kernel"})
        with pytest.raises(jq.PlanError, match="other#dot cannot be .*: this call does not reach"):
            made.check_reached({"other#dot": "other"})


def test_inputs_that_are_not_finite_are_named():
    model, variables, batches = llama()
    broken = jax.tree.map(lambda x: x, variables)
    scale = broken["layers"][1]["attention_norm"]["scale"]
    broken["layers"][1]["attention_norm"]["scale"] = scale.replace(
        scale.get_value().at[3].set(jnp.nan)
    )
    done = []
    names = ", ".join(f"layers/1/attention/{x}/kernel" for x in "qkv")
    with (
        Store(1 << 30) as store,
        pytest.raises(ValueError, match=f"56 rows of the inputs of {names} hold NaN or infinity"),
    ):
        for index, _, _ in walk((model, broken, batches), store, observers=()).levels():
            done.append(index)
    assert done == [0, 1, 2, 3]


def test_layers_of_one_shape_share_programs():
    made = []
    for layers in (2, 4):
        model = Llama(LLAMA.__class__(**{**vars(LLAMA), "layers": layers}), rngs=nnx.Rngs(0))
        with Store(1 << 30) as store:
            one = walk((model, nnx.state(model), llama()[2][:1]), store)
            for _ in one.levels():
                pass
            made.append(one.programs.compiled)
    assert made[0] == made[1]
