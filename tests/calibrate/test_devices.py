"""Over several devices: to the bit with a unit, and hardly different without."""

import functools

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, Order
from jaxquant.calibrate import calibrate, Settings
from jaxquant.calibrate._devices import Devices, in_units
from jaxquant.models import Llama

INT4_G8 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=8))
RECIPE = jq.Recipe(
    name="gptq",
    rules=(
        jq.Rule(match="*embed*", optional=True),
        jq.Rule(match="*router*", optional=True),
        jq.Rule(match="*", weights=INT4_G8, algorithm=GPTQ(order=Order.STATIC)),
    ),
)


def mesh(count, name="data"):
    return Mesh(np.array(jax.devices()[:count]), (name,))


@functools.cache
def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    # Two rounds of four units of 2 windows, a round of one, and a unit of one window.
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (19, 16))
    return model, nnx.state(model), tokens


@functools.cache
def experts():
    model = moe.Decoder(scanned=True)
    variables = model.init(jax.random.key(0), moe.TOKENS)
    return model, variables, np.random.default_rng(0).integers(0, moe.VOCABULARY, (10, 16))


@functools.cache
def run(make, devices=None, unit=None, size=19):
    model, variables, tokens = make()
    batches = [(jnp.asarray(tokens[i : i + size]),) for i in range(0, len(tokens), size)]
    plan = jq.plan(model, variables, *batches[0], recipe=RECIPE)
    made = calibrate(
        model,
        variables,
        batches,
        plan,
        mesh=None if devices is None else mesh(devices),
        settings=Settings(unit=unit),
    )
    return plan, made


def same(a, b):
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(left, right, strict=True)
    )


def logits(plan, made):
    model, _, tokens = llama()
    qmodel = jq.wrap(model, plan, made.qvariables)
    return np.asarray(qmodel(jnp.asarray(tokens)), np.float64)


@pytest.mark.parametrize("make", [llama, pytest.param(experts, marks=pytest.mark.slow)])
def test_units_give_the_same_bits_on_any_number_of_devices(make):
    _, wanted = run(make, None, 2)
    _, made = run(make, 4, 2)
    assert same(wanted.qvariables, made.qvariables)
    assert [row.rows for row in made.sites] == [row.rows for row in wanted.sites]
    for row in made.sites:
        assert row.error < row.nearest_error


def test_units_do_not_depend_on_how_windows_are_dealt_out_to_batches():
    assert same(run(llama, None, 2)[1].qvariables, run(llama, 4, 2, 4)[1].qvariables)


@pytest.mark.slow
def test_plain_sums_differ_in_the_last_bit_alone():
    plan, wanted = run(llama, None, None, 4)
    _, made = run(llama, 4, None, 4)
    # A sum in another order turns a code that lies on an edge, and those that make up for it.
    held = [
        np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(m.qvariables)])
        for m in (made, wanted)
    ]
    assert np.mean(held[0] == held[1]) > 0.97
    model, _, tokens = llama()
    exact = np.asarray(model(jnp.asarray(tokens)), np.float64)
    errors = [np.square(logits(plan, m) - exact).mean() for m in (made, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_what_is_returned_lies_where_variables_do():
    _, made = run(llama, 4, 2)
    assert {d for x in jax.tree.leaves(made.qvariables) for d in x.devices()} == {jax.devices()[0]}


def test_rows_are_dealt_out_where_they_divide():
    devices = Devices(mesh=mesh(4), axis="data", unit=None)
    w = devices.by_rows(jnp.ones((2, 8, 3)))
    assert {s.data.shape for s in w.addressable_shards} == {(2, 2, 3)}
    w = devices.by_rows(jnp.ones((6, 3)))
    assert {s.data.shape for s in w.addressable_shards} == {(6, 3)}


def test_an_axis_that_the_mesh_has_not_is_an_error():
    with pytest.raises(ValueError, match=r"axes \('x',\), and none is called 'data'"):
        Devices(mesh=mesh(2, "x"), axis="data", unit=None)


def test_a_unit_cuts_the_leading_axis():
    batches = [(jnp.zeros((5, 3)), jnp.zeros((5,))), (jnp.zeros((2, 3)), jnp.zeros((2,)))]
    assert [[x.shape for x in part] for part in in_units(batches, 2)] == [
        [(2, 3), (2,)],
        [(2, 3), (2,)],
        [(1, 3), (1,)],
        [(2, 3), (2,)],
    ]


@pytest.mark.parametrize("batch", [(1.0,), (np.ones(3), np.ones(4)), ()])
def test_a_unit_needs_windows(batch):
    with pytest.raises(ValueError, match="windows along its leading axis"):
        in_units([batch], 2)


def test_a_unit_holds_something():
    with pytest.raises(ValueError, match="A unit of 0 windows"):
        in_units([(np.ones(3),)], 0)


def test_variables_and_tokens_may_be_bound_to_one_device():
    model, variables, tokens = llama()
    first = jax.devices()[0]
    variables = jax.device_put(variables, first)
    a8 = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
    rules = (
        jq.Rule(match="*embed*", optional=True),
        jq.Rule(
            match="*",
            weights=INT4_G8,
            activations=a8,
            static=True,
            algorithm=GPTQ(order=Order.STATIC),
            scaling=AWQ(ratios=4),
        ),
    )
    batch = (jnp.asarray(tokens[:4]),)
    plan = jq.plan(model, variables, *batch, recipe=jq.Recipe(name="all", rules=rules))
    made = calibrate(model, variables, [batch], plan, mesh=mesh(2))
    out = jq.wrap(model, plan, made.qvariables)(jax.device_put(batch[0], first))
    assert bool(jnp.isfinite(out).all())
    lies = {d for x in jax.tree.leaves(made.qvariables) for d in x.devices()}
    assert lies == {first}
