"""Plans as text."""

import re

import jax
import pytest
from exact import inputs, W8, W8A8, W8A16
from flax import linen as nn
from linen_models import CASES
from methods import Informed, Smooth

import jaxquant as jq
from jaxquant.intercept import SiteAccount
from jaxquant.intercept._show import site_lines
from jaxquant.ops import Outliers
from jaxquant.qarray import WeightError


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


def test_an_account_fits_too_and_tells_bits_noise_and_rules():
    names = {"short": 3, "a_module_whose_name_is_longer_than_any_column_can_be_made": 2}
    sites = tuple(
        SiteAccount(
            site=f"{name}/{i}/kernel#dot",
            path=f"{name}/{i}/kernel",
            shape=(24, 1024, 14336, 3, 3),
            weights=jq.Scheme(values=jq.E4M3, tile=jq.Tile(contracted=128, kept=128)),
            activations=jq.Scheme(values=jq.E4M3, tile=jq.Tile(contracted=128)),
            bits_per_value=8.25 + i,
            rule="a_module*or_another_pattern_of_many_letters/*",
            reason=None if i else "left by a rule",
            error=WeightError(relative=0.1**i, largest=1.0),
        )
        for name, count in names.items()
        for i in range(count)
    )
    lines = site_lines(sites, measured=True)
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["site", "shape", "scheme", "bits", "SQNR", "dB", "rule"]
    assert [line.split()[2:4] for line in lines if "9.250" in line] == 2 * [["9.250", "20.0"]]
    text = " ".join(" ".join(lines).split())
    assert text.count("left: left by a rule") == 2
    assert text.count("e4m3 128x128 / e4m3 g128") == 3


def test_a_weight_without_noise_is_exact():
    site = SiteAccount(
        site="w#dot",
        path="w",
        shape=(8, 8),
        weights=W8,
        activations=None,
        bits_per_value=12.0,
        rule="*",
        reason=None,
        error=WeightError(relative=0.0, largest=0.0),
    )
    assert site_lines((site,), measured=True)[1].split() == [
        *["w#dot", "8x8", "int8", "channel", "12.000", "exact", "*"]
    ]


@pytest.mark.parametrize(
    "added, held",
    [
        ({}, "int8 channel / int8 tensor"),
        ({"algorithm": Informed()}, "int8 channel (informed) / int8 tensor"),
        (
            {"algorithm": Informed(), "scaling": Smooth(), "static": True},
            "int8 channel (smooth, informed) / int8 tensor static",
        ),
        ({"outliers": Outliers()}, "int8 channel / int8 tensor below 6"),
        ({"outliers": Outliers(threshold=2.5)}, "int8 channel / int8 tensor below 2.5"),
    ],
)
def test_what_is_done_beside_rounding_is_told(added, held):
    tensor = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
    rule = jq.Rule(match="*", weights=W8, activations=tensor, **added)
    model, x = nn.Dense(8), inputs(4, 8)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))
    assert re.search(f"  {re.escape(held)}(  |$)", str(plan), re.MULTILINE)
