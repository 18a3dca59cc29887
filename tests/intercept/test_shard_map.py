"""Bodies of `shard_map` that use a weight: each device computes on its own codes and scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, dequantized, inputs, LOWEST, W8, W8A8, W8A16, weight, wrapped
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from states import COLUMNS_A16, quantized, with_state

import jaxquant as jq
from jaxquant.qarray import leaf_specs

DEVICES = 4
MESH = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))


def _mapped(body, in_specs, out_specs, **options):
    return jax.shard_map(body, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **options)


def column(x, w):
    return _mapped(jnp.matmul, (P(), P(None, "d")), P(None, "d"))(x, w)


def row(x, w):
    body = lambda x, w: lax.psum(x @ w, "d")  # noqa: E731
    return _mapped(body, (P(None, "d"), P("d", None)), P())(x, w)


def data(x, w):
    """Rows of the input are sharded; every device holds the whole weight."""
    return _mapped(jnp.matmul, (P("d"), P()), P("d"))(x, w)


def experts(x, w):
    return _mapped(lambda x, w: jnp.einsum("enk,ekf->enf", x, w), (P("d"), P("d")), P("d"))(x, w)


def layered(x, w):
    """A scan over layers inside, each sharded by columns and by rows in turn."""

    def body(x, w):
        def layer(x, w):
            return lax.psum(x @ w, "d") / 128 @ jnp.ones((8, 2)), None

        return lax.scan(layer, x, w)[0]

    mapped = _mapped(body, (P(None, "d"), P(None, "d")), P(None, "d"), check_vma=False)
    return mapped(x, w)


G64 = jq.Recipe(
    name="g64",
    rules=(
        jq.Rule(
            match="*",
            weights=jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=64), range=LOWEST),
        ),
    ),
)
CASES = {
    "column": (column, inputs(8, 16), weight(16, 8), W8A16),
    "row": (row, inputs(8, 16), weight(16, 8), W8A16),
    "data": (data, inputs(8, 16), weight(16, 8), W8A16),
    "experts": (experts, inputs(4, 8, 16), weight(4, 16, 8), W8A16),
    # 9 groups over 4 devices: tile boundaries fall inside shards of 144.
    "nine groups by rows": (row, inputs(8, 576), weight(576, 8), G64),
    "nine groups by columns": (column, inputs(8, 576), weight(576, 8), G64),
}
every_case = pytest.mark.parametrize("name", CASES)


def _setting(name, recipe=None):
    function, x, w, own = CASES[name]
    model, variables = Applied(function, w.shape), {"params": {"w": w}}
    plan = jq.plan(model, variables, x, recipe=recipe or own)
    return model, plan, variables, jq.quantize(variables, plan), x


@every_case
def test_infer_equals_the_plain_model_on_dequantized_weights(name):
    model, plan, _, qvariables, x = _setting(name)
    want = jax.jit(model.apply)(dequantized(qvariables), x)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    np.testing.assert_array_equal(got, want)


@every_case
def test_statistics_are_those_of_all_devices_data_counted_once(name):
    model, _, variables, _, x = _setting(name)
    stats = jq.observe(
        model,
        variables,
        [(x,)],
        observers=(jq.observers.Moments(), jq.observers.Peak(), jq.observers.Gram()),
    )["w#dot"]
    rows = x.reshape(*x.shape[:-2], -1, x.shape[-1])
    np.testing.assert_array_equal(stats["moments"]["rows"], np.full(x.shape[:-2], rows.shape[-2]))
    np.testing.assert_array_equal(stats["moments"]["magnitude"], jnp.abs(rows).sum(-2))
    np.testing.assert_array_equal(stats["peak"], jnp.abs(rows).max(-2))
    np.testing.assert_array_equal(stats["gram"], jnp.einsum("...rk,...rl->...kl", rows, rows))


@every_case
def test_sharded_variables_give_the_same(name):
    model, plan, variables, qvariables, x = _setting(name)
    spec = P("d") if name in ("row", "experts", "nine groups by rows") else P(None, "d")
    placed = jax.device_put(variables, NamedSharding(MESH, spec))
    sharded = jq.quantize(placed, plan)
    apply = jax.jit(wrapped(model, plan).apply)
    np.testing.assert_array_equal(apply(sharded, x), apply(qvariables, x))


def test_each_device_rounds_its_own_part_of_the_activations():
    model, plan, _, qvariables, x = _setting("row", W8A8)
    got = jq.wrap(model, plan, backend="reference").apply(qvariables, x)
    parts = zip(
        jnp.split(x, DEVICES, 1), jnp.split(qvariables["params"]["w"].codes, DEVICES), strict=True
    )
    scale = qvariables["params"]["w"].scale
    want = sum(
        jq.dequantize(jq.quantize_activation(part, W8, contracted=(1,)))
        @ (codes.astype(jnp.float32) * scale)
        for part, codes in parts
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * 2**-23 * float(jnp.abs(want).max()))


def test_statistics_that_cannot_be_told_apart_are_refused():
    x, w = inputs(4, 8), weight(3, 8, 8)
    model, variables = Applied(layered, w.shape), {"params": {"w": w}}
    with pytest.raises(jq.PlanError, match="Observe with check_vma=True"):
        jq.observe(model, variables, [(x,)])
    plan = jq.plan(model, variables, x, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    want = jax.jit(model.apply)(dequantized(qvariables), x)
    np.testing.assert_allclose(wrapped(model, plan).apply(qvariables, x), want, rtol=1e-6)


def test_a_sharded_stack_of_layers_is_refused():
    def body(x, w):
        x = lax.pcast(x, ("d",), to="varying")
        return lax.psum(lax.scan(lambda x, w: (x @ w, None), x, w)[0], "d")

    function = functools.partial(_mapped(body, (P(), P("d")), P()))
    model, variables = Applied(function, (4, 8, 8)), {"params": {"w": weight(4, 8, 8)}}
    with pytest.raises(jq.PlanError, match="cannot be stacked"):
        jq.observe(model, variables, [(inputs(4, 8),)])


def test_the_wrapped_call_may_itself_stand_in_a_shard_map():
    model, variables, x = (
        Applied(jnp.matmul, (16, 8)),
        {"params": {"w": weight(16, 8)}},
        inputs(8, 16),
    )
    plan = jq.plan(model, variables, x, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    q, stamp = qvariables["params"]["w"], qvariables["jaxquant"]

    def body(q, x):
        local = wrapped(Applied(jnp.matmul, q.shape), plan)
        return local.apply({"params": {"w": q}, "jaxquant": stamp}, x)

    specs = leaf_specs(q, P(None, "d"), MESH)
    got = jax.jit(_mapped(body, (specs, P()), P(None, "d")))(q, x)
    np.testing.assert_array_equal(got, x @ variables["params"]["w"])
    got = jax.jit(_mapped(body, (P(), P("d")), P("d")))(q, x)
    np.testing.assert_array_equal(got, x @ variables["params"]["w"])


def test_a_users_rule_inside_stays_in_force():
    @jax.custom_jvp
    def f(x, w):
        return x @ w

    f.defjvp(lambda p, t: (f(*p), 2.0 * (t[0] @ p[1])))
    function = _mapped(f, (P("d"), P()), P("d"))
    model, variables, x = (
        Applied(function, (16, 8)),
        {"params": {"w": weight(16, 8)}},
        inputs(8, 16),
    )
    plan = jq.plan(model, variables, x, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(jax.grad(lambda x: wrapped(model, plan).apply(qvariables, x).sum()))(x)
    np.testing.assert_array_equal(got, 2 * jnp.ones((8, 8)) @ variables["params"]["w"].T)


def test_gradients_to_inputs_pass_through():
    model, plan, _, qvariables, x = _setting("row")
    loss = lambda model, variables: lambda x: model.apply(variables, x).sum()  # noqa: E731
    want = jax.grad(loss(model, dequantized(qvariables)))(x)
    got = jax.jit(jax.grad(loss(wrapped(model, plan), qvariables)))(x)
    np.testing.assert_array_equal(got, want)


def test_the_mesh_has_four_devices():
    assert isinstance(MESH, Mesh) and MESH.size == len(jax.devices()) == DEVICES


@pytest.mark.parametrize("name", ["column", "data", "experts"])
def test_state_of_sites_goes_in_with_the_weight(name):
    function, x, w, _ = CASES[name]
    w = weight(*w.shape, contracted=(-1,))
    model, variables = Applied(function, w.shape), {"params": {"w": w}}
    plan = jq.plan(model, variables, x, recipe=COLUMNS_A16)
    tree = with_state(variables, plan)
    got = jax.jit(wrapped(model, plan).apply)(tree, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))


def test_state_of_inputs_that_devices_share_out_is_refused():
    function, x, w, _ = CASES["row"]
    model, variables = Applied(function, w.shape), {"params": {"w": w}}
    plan = jq.plan(model, variables, x, recipe=COLUMNS_A16)
    for name in ("smoothing", "permutation"):
        tree = with_state(variables, plan, names=(name,))
        with pytest.raises(jq.PlanError, match=f"cuts the inputs of w, and the {name} of w#dot"):
            jq.wrap(model, plan).apply(tree, x)


@pytest.mark.parametrize("name", ["row", "column"])
def test_one_static_scale_is_every_devices(name):
    function, x, w, _ = CASES[name]
    model, variables = Applied(function, w.shape), {"params": {"w": w}}
    tensor = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
    rule = jq.Rule(match="*", weights=W8, activations=tensor, static=True)
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="static", rules=(rule,)))
    tree = quantized(variables, plan, {"w#dot": {"scale": jnp.ones(1)}})
    # Whole numbers of at most 4, with a scale of 1: nothing is rounded.
    got = wrapped(model, plan).apply(tree, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))
