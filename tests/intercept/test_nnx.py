"""A wrapped NNX model: the same calls and the same state, with other arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close, W8, W8A8, W8A16
from flax import nnx
from nnx_models import Attending, D, Layer, Listed, MLP, Scanned, Tied

import jaxquant as jq

# Sowing outside `nnx.capture` is deprecated, and has to work as long as Flax has it.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

X = jax.random.normal(jax.random.key(5), (4, D))
IDS = jnp.array([[1, 2, 10], [0, 5, 1]])
MODELS = {MLP: X, Tied: IDS, Listed: X, Scanned: X}
every_model = pytest.mark.parametrize(
    "kind, x", MODELS.items(), ids=lambda v: getattr(v, "__name__", "")
)


def _plain(model, qvariables):
    """A model of its own with the dequantized weights."""
    state = nnx.State({k: v for k, v in dict(qvariables).items() if k != "jaxquant"})
    arrays = jax.tree.map(
        lambda leaf: jq.dequantize(leaf) if isinstance(leaf, jq.QArray) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, jq.QArray),
    )
    return nnx.merge(nnx.graphdef(model), arrays, copy=True)


def _setting(kind, x, recipe=W8A16):
    model = kind(nnx.Rngs(params=0, dropout=1))
    plan = jq.plan(model, nnx.state(model), x, recipe=recipe)
    qvariables = jq.quantize(nnx.state(model), plan)
    return model, plan, qvariables


def _others(model):
    """Everything that is no parameter, as plain data."""
    return jax.tree.map(
        lambda v: jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v,
        nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))),
    )


@every_model
def test_calls_and_what_they_write_equal_the_plain_model(kind, x):
    model, plan, qvariables = _setting(kind, x)
    want, got = _plain(model, qvariables), jq.wrap(model, plan, qvariables)
    for _ in range(2):
        assert_close(got(x), want(x))
    assert_close(_others(got.model), _others(want))


@every_model
def test_the_users_model_is_not_changed(kind, x):
    model, plan, qvariables = _setting(kind, x)
    before = _others(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jq.wrap(model, plan, qvariables)(x)
    after = _others(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@every_model
def test_apply_is_pure(kind, x):
    model, plan, qvariables = _setting(kind, x)
    qmodel = jq.wrap(model, plan, qvariables)
    want = _plain(model, qvariables)(x)
    for _ in range(2):
        assert_close(jax.jit(qmodel.apply)(qvariables, x), want)


@every_model
def test_it_runs_under_nnx_jit_and_writes_state_there(kind, x):
    model, plan, qvariables = _setting(kind, x)
    want, got = _plain(model, qvariables), jq.wrap(model, plan, qvariables)
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(1)
        return model(x)

    for _ in range(3):
        assert_close(step(got, x), want(x))
    # What is sown grows by one value a call, so that each call sees another structure.
    assert len(traces) == (3 if kind is MLP else 1)
    assert_close(_others(got.model), _others(want))


def test_other_methods_of_the_model_are_evaluated_too():
    model, plan, qvariables = _setting(MLP, X, W8A8)
    got, want = jq.wrap(model, plan, qvariables), _plain(model, qvariables)
    near, far = got.hidden(X), want.hidden(X)
    assert 0 < jnp.abs(near - far).max() < 0.1
    assert got.up is got.model.up
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = got.absent


def test_captured_values_come_out_as_without_us():
    model, plan, qvariables = _setting(MLP, X)
    got, want = jq.wrap(model, plan, qvariables), _plain(model, qvariables)
    wanted, seen = nnx.capture(want, nnx.Intermediate)(X)
    found, qseen = nnx.capture(got, nnx.Intermediate)(X)
    assert_close(found, wanted)
    assert_close(nnx.to_pure_dict(qseen)["model"], nnx.to_pure_dict(seen))


def test_a_cache_is_written_to_the_wrapped_model():
    model = Attending(nnx.Rngs(0))
    model.attention.init_cache((2, 5, D))
    x = jax.random.normal(jax.random.key(1), (2, 1, D))
    plan = jq.plan(model, nnx.state(model), x, recipe=W8A16)
    qvariables = jq.quantize(nnx.state(model), plan)
    want, got = _plain(model, qvariables), jq.wrap(model, plan, qvariables)
    for step in range(3):
        assert_close(got(x + step), want(x + step))
    assert int(got.model.attention.cache_index.get_value()) == 3
    assert_close(_others(got.model), _others(want))


def test_a_tied_embedding_is_one_qarray_read_by_two_sites():
    _, plan, _ = _setting(Tied, IDS)
    assert {s.site for s in plan.sites} == {
        "embed/embedding#take",
        "embed/embedding#dot",
        "up/kernel#dot",
    }


def test_a_shared_layer_is_one_parameter_with_two_sites():
    _, plan, qvariables = _setting(Listed, X)
    paths = [leaf.path for leaf in plan.leaves]
    assert len(paths) == len(set(paths)) == 3
    uses = [s.site for s in plan.sites if s.site.endswith(".1")]
    assert len(uses) == 1


def test_scanned_layers_have_scales_of_their_own_and_stacked_statistics():
    model, plan, qvariables = _setting(Scanned, X)
    assert plan.by_site["layers/linear/kernel#dot"].roles == ("stack", "contracted", "kept")
    stats = jq.observe(model, nnx.state(model), [(X,)])
    x = X
    for i in range(3):
        np.testing.assert_allclose(
            stats["layers/linear/kernel#dot"]["peak"][i], jnp.abs(x).max(0), rtol=1e-6
        )
        layer = jax.tree.map(lambda v: v[i], nnx.state(model.layers))  # noqa: B023
        x = nnx.merge(nnx.graphdef(Layer(nnx.Rngs(0))), layer)(x)


def test_a_model_that_holds_qarrays_already_needs_no_variables():
    model, plan, qvariables = _setting(MLP, X)
    with pytest.raises(jq.PlanError, match="is an ordinary array"):
        jq.wrap(model, plan)
    held = nnx.merge(
        nnx.graphdef(model),
        nnx.State({k: v for k, v in dict(qvariables).items() if k != "jaxquant"}),
        copy=True,
    )
    want = jq.wrap(model, plan, qvariables)(X)
    assert_close(jq.wrap(held, plan)(X), want)
    # This time the model is the user's own, and is written to.
    assert int(held.norm.mean.get_value()[0] != 0)


def test_two_models_wrapped_around_one_tree_share_no_state():
    model, plan, qvariables = _setting(MLP, X)
    first, second = (jq.wrap(model, plan, qvariables) for _ in range(2))
    assert_close(first(X), second(X))
    assert_close(_others(first.model), _others(second.model))


def test_gradients_to_inputs_pass_a_weight_only_model():
    model, plan, qvariables = _setting(Tied, IDS)

    class Head(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x):
            return self.linear(x).sum()

    model, plan, qvariables = _setting(Head, X)
    qmodel = jq.wrap(model, plan, qvariables)
    want = jax.grad(lambda x: _plain(model, qvariables)(x))(X)
    assert_close(jax.grad(lambda x: qmodel.apply(qvariables, x))(X), want)
    assert_close(jax.grad(lambda x: qmodel(x))(X), want)


def test_rules_name_modules_by_their_path():
    rules = (jq.Rule(match="layers/1/*", weights=W8), jq.Rule(match="*"))
    model = Listed(nnx.Rngs(0))
    plan = jq.plan(model, nnx.state(model), X, recipe=jq.Recipe(name="one", rules=rules))
    assert [leaf.path for leaf in plan.leaves] == ["layers/1/kernel"]


def test_variables_of_another_plan_are_refused():
    model, plan, qvariables = _setting(Tied, IDS)
    _, other, _ = _setting(Tied, IDS, W8A8)
    with pytest.raises(jq.PlanError, match=plan.fingerprint):
        jq.wrap(model, other, qvariables)
    with pytest.raises(jq.PlanError, match="not quantized"):
        jq.wrap(model, plan, nnx.state(model))
