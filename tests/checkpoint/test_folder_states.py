"""State of sites in checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from quantized_trees import assert_same, linen_tree, nnx_tree

from jaxquant.checkpoint import load, save
from jaxquant.intercept import stamped
from jaxquant.intercept._variables import states_of, unstamped
from jaxquant.ops import Outliers

MESH = jax.make_mesh((4,), ("x",))
every_tree = pytest.mark.parametrize("make", [linen_tree, nnx_tree])


@pytest.mark.parametrize("filled", [False, True], ids=["bare", "template"])
@every_tree
def test_state_of_sites_travels_along_in_version_3(make, filled, tmp_path):
    bare, plan = make()
    site = plan.sites[0].site
    states = {site: {"smoothing": jnp.linspace(1.0, 2.0, 24), "scale": jnp.ones(1)}}
    tree = stamped(unstamped(bare)[0], plan.fingerprint, states)
    assert save(tmp_path / "bare", bare, plan).version == 2
    assert save(tmp_path / "full", tree, plan).version == 3
    template = {"template": unstamped(bare)[0]} if filled else {}
    loaded, _ = load(tmp_path / "full", **template)
    assert_same(loaded, tree)
    assert set(states_of(loaded)[site]) == {"smoothing", "scale"}


def test_a_plan_with_static_activations_or_outliers_is_of_version_3(tmp_path):
    tree, plan = linen_tree()
    for changes in ({"static": True}, {"outliers": Outliers()}):
        sites = (dataclasses.replace(plan.sites[0], **changes), *plan.sites[1:])
        own = dataclasses.replace(plan, sites=sites)
        held = stamped(unstamped(tree)[0], own.fingerprint)
        assert save(tmp_path / str(changes), held, own).version == 3
        assert load(tmp_path / str(changes))[1].sites == sites


def test_state_of_sites_is_on_every_device_whatever_the_patterns_say(tmp_path):
    bare, plan = linen_tree()
    states = {plan.sites[0].site: {"smoothing": jnp.linspace(1.0, 2.0, 24)}}
    save(tmp_path, stamped(unstamped(bare)[0], plan.fingerprint, states), plan)
    loaded, _ = load(tmp_path, sharding=(MESH, {"int4/groups": P("x"), "[!j]*": P()}))
    (held,) = states_of(loaded)[plan.sites[0].site].values()
    assert held.sharding == NamedSharding(MESH, P())
    assert loaded["params"]["int4"]["groups"].codes.sharding.spec[0] == "x"
