"""How parameters lie on a mesh reaches the products that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from quantized import SCHEMES

import jaxquant as jq
from jaxquant.intercept._placed import check_gathered, placed, undivided, weight_sharding
from jaxquant.intercept._plan import PlanError
from jaxquant.intercept._weight import Weight, whole

MESH = Mesh(np.asarray(jax.devices()), ("x",))
RECIPE = jq.Recipe(name="all", rules=(jq.Rule(match="*", weights=SCHEMES["int4 zero g64"]),))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(256, name="up", use_bias=False)(x)
        return x + nn.Dense(256, name="down", use_bias=False)(x), None


SPECS = {"up": P(None, None, "x"), "down": P(None, "x", None)}


def _planned(backend: str | None = None):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)
    model = Scanned()
    variables = model.init(jax.random.key(0), x)
    sharding = {
        "params": {
            "layers": {name: {"kernel": NamedSharding(MESH, spec)} for name, spec in SPECS.items()}
        }
    }
    plan = jq.plan(model, variables, x, recipe=RECIPE, sharding=sharding)
    return model, plan, variables, x, sharding


def test_the_plan_knows_the_mesh_and_keeps_its_fingerprint():
    model, plan, variables, x, _ = _planned()
    assert plan.mesh == MESH.abstract_mesh
    assert [leaf.spec for leaf in plan.leaves] == [("", "", "x"), ("", "x", "")]
    assert plan == jq.plan(model, variables, x, recipe=RECIPE)


def test_a_slice_and_a_transpose_of_a_weight_lie_as_their_axes():
    _, plan, variables, _, _ = _planned()
    kernel = variables["params"]["layers"]["up"]["kernel"]
    weight = whole(kernel, "layers/up/kernel")
    found = weight_sharding(weight, plan)
    assert found is not None and found.spec == P(None, None, "x")
    turned = weight.view(kernel[0].T, ((2,), (1,)))
    found = weight_sharding(turned, plan)
    assert found is not None and found.spec == P("x", None)
    merged = Weight(
        value=kernel.reshape(3, -1),
        path="layers/up/kernel",
        axes=((0,), (1, 2)),
        stored=kernel.shape,
    )
    assert weight_sharding(merged, plan) is None


def test_parameters_on_different_meshes_are_refused():
    _, plan, *_ = _planned()
    other = AbstractMesh((2,), ("y",))
    shardings = {
        "layers/up/kernel": NamedSharding(MESH, P()),
        "layers/down/kernel": NamedSharding(other, P()),
    }
    with pytest.raises(jq.PlanError, match="The parameters lie on 2 meshes"):
        placed(plan, shardings)


def test_a_scanned_model_runs_kernels_on_four_devices_without_gathering_weights():
    model, plan, variables, x, sharding = _planned()
    qvariables = jq.prepare(jq.quantize(variables, plan), plan, backend="mosaic_tpu")
    expected = jq.wrap(model, plan, backend="reference").apply(qvariables, x)
    held = jax.tree.map(lambda leaf: leaf, qvariables)
    for name, where in sharding["params"]["layers"].items():
        weight = held["params"]["layers"][name]["kernel"]
        weight = weight.unbox() if hasattr(weight, "unbox") else weight
        held["params"]["layers"][name]["kernel"] = jq.qarray.place(weight, where["kernel"])
    apply = jax.jit(jq.wrap(model, plan, backend="mosaic_tpu").apply)
    np.testing.assert_allclose(apply(held, x), expected, rtol=1e-4, atol=1e-4)
    lines = apply.lower(held, x).compile().as_text().splitlines()
    exchanged = [line for line in lines if " all-gather(" in line or " all-reduce(" in line]
    # Activations alone: 8 rows of 256.
    assert exchanged and all("f32[8,256]" in line.split("(")[0] for line in exchanged)


@pytest.mark.parametrize(
    ("spec", "left"),
    [(P("x"), P(None)), (P(("y", "x"), None), P(("y",), None)), (P(None, "y"), P(None, ("y",)))],
)
def test_gathering_takes_its_axes_out_of_a_sharding(spec, left):
    mesh = AbstractMesh((2, 2), ("x", "y"))
    assert undivided(NamedSharding(mesh, spec), frozenset("x")).spec == left


def test_axes_to_gather_have_to_cut_a_parameter():
    model, plan, variables, x, _ = _planned()
    check_gathered(plan, frozenset("x"))
    with pytest.raises(PlanError, match="gather='y' names a mesh axis.*those that do are: x"):
        check_gathered(plan, frozenset({"x", "y"}))
    with pytest.raises(PlanError, match="those that do are: none"):
        check_gathered(jq.plan(model, variables, x, recipe=RECIPE), frozenset("y"))
