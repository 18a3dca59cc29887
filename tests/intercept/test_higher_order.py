"""Laws over every way in which JAX hands a weight to a body: constant, carried, scanned, batched.

Weights and inputs are whole numbers on the int8 grid (`exact`), so results are equal, not close.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, dequantized, inputs, W8A16, weight, wrapped
from transforms import K, ROWS

import jaxquant as jq

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def _model(row):
    model = Applied(row.function, row.shape)
    return model, {"params": {"w": weight(*row.shape)}}, inputs(5, K)


@every_row
def test_infer_equals_the_plain_model_on_dequantized_weights(row):
    model, variables, x = _model(row)
    plan = jq.plan(model, variables, x, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    assert isinstance(qvariables["params"]["w"], jq.QArray)
    want = jax.jit(model.apply)(dequantized(qvariables), x)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@every_row
def test_the_plan_lists_the_sites_and_no_other_reading(row):
    model, variables, x = _model(row)
    plan = jq.plan(model, variables, x, recipe=W8A16)
    assert {site.site for site in plan.sites} == set(row.seen(x, variables["params"]["w"]))
    lead = len(row.shape) - 2
    assert {site.roles for site in plan.sites} <= {
        ("stack",) * lead + ("contracted", "kept"),
        ("batch",) * lead + ("contracted", "kept"),
    }


@every_row
def test_observe_sees_what_the_plain_model_multiplies(row):
    model, variables, x = _model(row)
    stats = jq.observe(
        model,
        variables,
        [(x,)],
        observers=(jq.observers.Moments(), jq.observers.Peak(), jq.observers.Gram()),
    )
    expected = row.seen(x, variables["params"]["w"])
    assert set(stats) == set(expected)
    for site, seen in expected.items():
        rows = [np.asarray(step).reshape(-1, K) for step in seen]
        want = {
            "rows": [len(r) for r in rows],
            "nonfinite": [0 for _ in rows],
            "magnitude": [np.abs(r).sum(0) for r in rows],
            "square": [(r * r).sum(0) for r in rows],
            "peak": [np.abs(r).max(0) for r in rows],
            "gram": [r.T @ r for r in rows],
        }
        got = {**stats[site]["moments"], "peak": stats[site]["peak"], "gram": stats[site]["gram"]}
        for name, value in got.items():
            steps = np.stack(want[name]) if want[name] else np.zeros((1, *value.shape))
            if row.stacked:
                wanted = steps.reshape(value.shape)
            else:
                wanted = steps.max(0) if name == "peak" else steps.sum(0)
            if site == "w#dot" and row.name == "cond two sites":
                # The branch that is not taken contributes zeros, and no rows.
                wanted = np.zeros_like(wanted)
            np.testing.assert_array_equal(value, wanted, err_msg=f"{site} {name}")


@every_row
def test_statistics_of_batches_add_up(row):
    model, variables, x = _model(row)
    y = inputs(7, K, seed=2)
    both = jq.observe(model, variables, [(x,), (y,)])
    apart = [jq.observe(model, variables, [(b,)]) for b in (x, y)]
    for site, stats in both.items():
        a, b = (part[site] for part in apart)
        np.testing.assert_array_equal(stats["peak"], jnp.maximum(a["peak"], b["peak"]))
        jax.tree.map(
            lambda s, a, b: np.testing.assert_array_equal(s, a + b),
            stats["moments"],
            a["moments"],
            b["moments"],
        )
