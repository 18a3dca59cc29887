"""Plans as text."""

import jax
import pytest
from exact import inputs, W8, W8A8, W8A16
from flax import linen as nn
from linen_models import CASES

import jaxquant as jq


class Deep(nn.Module):
    """Long names, and sites that are left for long reasons."""

    levels: int = 5

    @nn.compact
    def __call__(self, x):
        if self.levels:
            return Deep(self.levels - 1, name=f"a_module_with_a_long_name_{self.levels}")(x)
        w = self.param("derived", nn.initializers.normal(), (8, 8))
        return nn.Dense(8, name="an_ordinary_projection")(x) @ (w / w.sum())


def _deep_plan():
    model, x = Deep(), inputs(4, 8)
    rules = (jq.Rule(match="*derived"), jq.Rule(match="*", weights=W8, activations=W8))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return jq.plan(model, variables, x, recipe=jq.Recipe(name="deep", rules=rules))


@pytest.mark.parametrize("recipe", [W8A16, W8A8], ids=lambda r: r.name)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_a_plan_fits_a_terminal_of_100_columns(case, recipe):
    variables = jax.eval_shape(case.model.init, jax.random.key(0), *case.args)
    plan = jq.plan(case.model, variables, *case.args, recipe=recipe)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 100
    assert plan.fingerprint in lines[0]
    for site in plan.sites:
        assert site.site in str(plan)


def test_long_paths_keep_their_ends_and_reasons_are_told_in_full():
    plan = _deep_plan()
    assert max(map(len, str(plan).splitlines())) <= 100
    text = " ".join(str(plan).split())
    assert "ordinary_projection/kernel#dot" in text
    assert "left: it reads a_module" in text


def test_totals_come_last():
    assert str(_deep_plan()).splitlines()[-1] == (
        "1 sites quantized, 1 left; 136 parameters, 544 B -> 384 B, 22.588 bits a weight"
    )
