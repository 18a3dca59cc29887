"""A plan says by what each product is computed, and why not by the device's first choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import jaxquant as jq


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(512, name="up", use_bias=False, dtype=x.dtype)(x)
        return nn.DenseGeneral((4, 16), name="heads", use_bias=False, dtype=x.dtype)(x)


def _plan(rows: int) -> jq.Plan:
    scheme = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=64))
    recipe = jq.Recipe(name="all", rules=(jq.Rule(match="*", weights=scheme),))
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: Two().init(jax.random.key(0), x), x)
    return jq.plan(Two(), variables, x, recipe=recipe)


def _on(kind: str, devices: int = 1):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((devices,), ("x",), (AxisType.Auto,), abstract_device=device)
    )


def test_on_this_cpu():
    plan = _plan(8)
    assert [row[:2] for row in plan.backends] == [
        ("up/kernel#dot", "xla_cpu"),
        ("heads/kernel#dot", "xla_cpu"),
    ]
    assert "2 products computed by xla_cpu" in str(plan)


def test_on_a_tpu_kernels_take_what_they_read():
    with _on("TPU v6 lite"):
        plan = _plan(8)
    by_site = {site: (name, reason) for site, name, reason in plan.backends}
    assert by_site["up/kernel#dot"] == ("mosaic_tpu", None)
    name, reason = by_site["heads/kernel#dot"]
    assert name == "xla" and reason is not None and "weights of two axes" in reason
    said = " ".join(str(plan).split())
    assert "1 product computed by xla (heads/kernel#dot): kernels read weights of two axes" in said


def test_of_many_rows_xla_is_the_choice():
    with _on("TPU v6 lite"):
        by_site = {site: (name, reason) for site, name, reason in _plan(8192).backends}
    name, reason = by_site["up/kernel#dot"]
    assert name == "xla" and reason is not None and "there are 8192" in reason


def test_on_several_devices_how_weights_lie_has_to_be_known():
    with _on("TPU v6 lite", devices=4):
        by_site = {site: (name, reason) for site, name, reason in _plan(8).backends}
    name, reason = by_site["up/kernel#dot"]
    assert name == "xla" and reason is not None and "plan with sharded variables" in reason


def test_what_computes_a_product_is_no_part_of_what_a_plan_does():
    with _on("TPU v6 lite"):
        there = _plan(8)
    assert there == _plan(8) and there.backends != _plan(8).backends


@pytest.mark.parametrize("backend", [None, "mosaic_tpu", "triton_gpu"])
def test_a_model_with_rounded_activations_computes_the_same_by_every_backend(backend):
    model = nn.Dense(256, use_bias=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    plan = jq.plan(model, variables, x, recipe=jq.recipes.W8A8)
    qvariables = jq.quantize(variables, plan)
    expected = jq.wrap(model, plan, backend="xla").apply(qvariables, x)
    prepared = jq.prepare(qvariables, plan, backend=backend)
    got = jax.jit(jq.wrap(model, plan, backend=backend).apply)(prepared, x)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
