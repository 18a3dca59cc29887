"""Names of axes on quantized parameters: specs that fit codes and scales, leaf by leaf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close, dequantized
from flax import linen as nn, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxquant as jq
from jaxquant.intercept._boxes import specs_by_name

MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
K, N = 16, 12
X = jax.random.normal(jax.random.key(0), (4, K))
INIT = nn.initializers.lecun_normal()
CHANNEL = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
SCHEMES = {
    "channel": CHANNEL,
    "tensor": dataclasses.replace(CHANNEL, tile=jq.PER_TENSOR),
    "four groups": dataclasses.replace(CHANNEL, tile=jq.Tile(contracted=4)),
    "one group of all": dataclasses.replace(CHANNEL, tile=jq.Tile(contracted=16)),
    "zero points": dataclasses.replace(
        CHANNEL, range=jq.MinMax(), zero_point=jq.INT8, tile=jq.Tile(contracted=8)
    ),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)
# By scheme, whether scales follow codes along the contracted and the kept axis: on a mesh of two
# by two, and where no mesh is known.
FOLLOWS = {
    "channel": ((False, True), (False, True)),
    "tensor": ((False, False), (False, False)),
    "four groups": ((True, True), (False, True)),
    "one group of all": ((False, True), (False, True)),
    "zero points": ((True, True), (False, True)),
}


def _recipe(name):
    return jq.Recipe(name="r", rules=(jq.Rule(match="*", weights=SCHEMES[name]),))


def _linen(box, name, **options):
    model = nn.Dense(N, kernel_init=box(INIT, ("x", "y"), **options))
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(model, jax.eval_shape(lambda: variables), X, recipe=_recipe(name))
    return model, plan, jq.quantize(variables, plan)


def _nnx(name, names=("x", "y")):
    with jax.set_mesh(MESH):
        init = nnx.with_partitioning(INIT, names)
        model = nnx.Linear(K, N, kernel_init=init, rngs=nnx.Rngs(0))
    plan = jq.plan(model, nnx.state(model), X, recipe=_recipe(name))
    return model, plan, jq.quantize(nnx.state(model), plan)


def _check(tree, specs, mesh=MESH):
    """Every leaf has a spec of its rank at most, which divides it, in a tree of one structure."""

    def one(leaf, spec):
        assert isinstance(spec, P) and len(spec) <= leaf.ndim
        placed = jax.device_put(leaf, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(np.asarray(placed), np.asarray(leaf))

    jax.tree.map(one, tree, specs)


def _wanted(name, known):
    x, y = FOLLOWS[name][0 if known else 1]
    return P("x" if x else None, "y" if y else None)


@every_scheme
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_boxes_give_each_leaf_its_spec(box, known, name):
    model, plan, qvariables = _linen(box, name)
    kernel = qvariables["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == ("x", "y")

    def specs():
        rules = [("x", "x"), ("y", "y")]
        with nn.logical_axis_rules(rules):
            return nn.get_partition_spec(qvariables)

    if known:
        with jax.set_mesh(MESH):
            found = specs()
    else:
        found = specs()
    _check(qvariables, found)
    assert found["params"]["kernel"].value.codes == P("x", "y")
    assert found["params"]["kernel"].value.scale == _wanted(name, known)
    if SCHEMES[name].zero_point is not None:
        assert found["params"]["kernel"].value.zero_point == _wanted(name, known)
    assert found["params"]["bias"] == P()


@every_scheme
def test_a_step_can_be_compiled_for_these_specs(name):
    model, plan, qvariables = _linen(nn.with_partitioning, name)
    with jax.set_mesh(MESH):
        specs = nn.get_partition_spec(qvariables)
    shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
    step = jax.jit(jq.wrap(model, plan).apply, in_shardings=(shardings, NamedSharding(MESH, P())))
    assert_close(step(qvariables, X), model.apply(dequantized(nn.unbox(qvariables)), X))
    with jax.set_mesh(MESH):
        got = jax.jit(jq.wrap(model, plan).apply)(jax.device_put(qvariables, shardings), X)
    assert_close(got, model.apply(dequantized(nn.unbox(qvariables)), X))


@every_scheme
def test_a_box_with_a_mesh_constrains_what_it_holds(name):
    model, plan, qvariables = _linen(nn.with_partitioning, name, mesh=MESH)
    box = qvariables["params"]["kernel"]
    q = jax.jit(lambda box: box.unbox())(box)
    assert q.codes.sharding.is_equivalent_to(NamedSharding(MESH, P("x", "y")), 2)
    assert q.scale.sharding.is_equivalent_to(NamedSharding(MESH, _wanted(name, True)), 2)
    assert box.get_sharding(MESH).value.scale == NamedSharding(MESH, _wanted(name, True))
    assert_close(
        jax.jit(jq.wrap(model, plan).apply)(qvariables, X), X @ jq.dequantize(box.unbox(False))
    )


def test_logical_names_are_looked_up_in_the_rules_in_force():
    model = nn.Dense(N, kernel_init=nn.with_logical_partitioning(INIT, ("embed", "mlp")))
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(model, variables, X, recipe=_recipe("four groups"))
    qvariables = jq.quantize(variables, plan)

    def scale():
        return nn.get_partition_spec(qvariables)["params"]["kernel"].value.scale

    rules = [("embed", ("x", "y")), ("mlp", None)]
    with jax.set_mesh(MESH), nn.logical_axis_rules(rules):
        # Four groups on four shards; with nothing to shard it, the other axis follows too.
        assert scale() == P("embed", "mlp")
        specs = nn.get_partition_spec(qvariables)
        shardings = nn.logical_to_mesh_sharding(specs, MESH, rules)
    placed = jax.device_put(qvariables, shardings)
    assert placed["params"]["kernel"].value.scale.sharding.spec == P(("x", "y"), None)
    assert scale() == P(None, "mlp")


def test_layers_of_a_scan_keep_the_name_of_their_axis():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            def layer(module, x):
                init = nn.with_partitioning(INIT, ("x", "y"))
                return nn.tanh(nn.Dense(K, kernel_init=init, name="dense")(x)), None

            scan = nn.scan(
                layer,
                variable_axes={"params": 1},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(self, x)[0]

    model = Layers()
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(model, jax.eval_shape(lambda: variables), X, recipe=_recipe("channel"))
    qvariables = jq.quantize(variables, plan)
    specs = nn.get_partition_spec(qvariables)["params"]["dense"]["kernel"].value
    assert specs.codes == P("x", "layers", "y") and specs.scale == P(None, "layers", "y")
    got = jax.jit(jq.wrap(model, plan).apply)(qvariables, X)
    plain = jax.tree.map(
        lambda x: jq.dequantize(x) if isinstance(x, jq.QArray) else x,
        {"params": qvariables["params"]},
        is_leaf=lambda x: isinstance(x, jq.QArray),
    )
    assert_close(got, model.apply(plain, X))


@every_scheme
@pytest.mark.parametrize("known", [True, False])
def test_nnx_names_give_each_leaf_its_spec(known, name):
    _, _, state = _nnx(name)
    if known:
        with jax.set_mesh(MESH):
            specs = nnx.get_partition_spec(state)
    else:
        specs = nnx.get_partition_spec(state)
    kernel = state["kernel"]
    assert isinstance(kernel, nnx.Param) and kernel.get_metadata()["out_sharding"] == ("x", "y")
    assert specs["kernel"].get_value().codes == P("x", "y")
    assert specs["kernel"].get_value().scale == _wanted(name, known)
    _check(state, specs)
    shardings = nnx.get_named_sharding(state, MESH)
    assert shardings["kernel"].get_value().codes == NamedSharding(MESH, P("x", "y"))


@every_scheme
def test_a_wrapped_nnx_model_with_names_runs(name):
    model, plan, state = _nnx(name)
    want = X @ jq.dequantize(state["kernel"].get_value()) + model.bias[...][None]
    with jax.set_mesh(MESH):
        placed = jax.device_put(
            state, jax.tree.map(lambda s: NamedSharding(MESH, s), nnx.get_partition_spec(state))
        )
    qmodel = jq.wrap(model, plan, placed)
    assert_close(jax.jit(qmodel.apply)(placed, X), want)
    assert_close(nnx.jit(lambda model, x: model(x))(qmodel, X), want)
    assert type(model.kernel) is nnx.Param


def test_parameters_without_names_stay_what_they_are():
    model = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    plan = jq.plan(model, nnx.state(model), X, recipe=_recipe("channel"))
    state = jq.quantize(nnx.state(model), plan)
    assert type(state["kernel"]) is nnx.Param
    assert nnx.get_partition_spec(state)["kernel"].get_value() == P()


def test_packed_codes_follow_only_where_the_mesh_is_known():
    q = jq.quantize_array(
        jnp.ones((K, 16)), dataclasses.replace(CHANNEL, values=jq.INT4), contracted=(0,)
    )
    q = jq.relayout(q, jq.Layout(packed=4))
    assert specs_by_name(q, ("x", "y"), ("x", "y"), None).codes == P("x", None)
    assert specs_by_name(q, ("x", "y"), ("x", "y"), MESH).codes == P("x", "y")


def test_checkpoints_hold_names_as_flax_has_them(tmp_path):
    _, plan, qvariables = _linen(nn.with_partitioning, "four groups")
    jq.save(tmp_path / "linen", qvariables, plan)
    loaded, _ = jq.load(tmp_path / "linen")
    assert jax.tree.structure(loaded) == jax.tree.structure(qvariables)
    assert '"flax.linen.Partitioned"' in (tmp_path / "linen/manifest.json").read_text()
    filled, _ = jq.load(tmp_path / "linen", template=_linen_template())
    assert jax.tree.structure(filled) == jax.tree.structure(qvariables)
    _, plan, state = _nnx("four groups")
    jq.save(tmp_path / "nnx", state, plan)
    assert '"flax.nnx.Param"' in (tmp_path / "nnx/manifest.json").read_text()
    loaded, _ = jq.load(tmp_path / "nnx")
    assert nnx.get_partition_spec(loaded)["kernel"].get_value().scale == P(None, "y")


def _linen_template():
    model = nn.Dense(N, kernel_init=nn.with_partitioning(INIT, ("x", "y")))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), X))
