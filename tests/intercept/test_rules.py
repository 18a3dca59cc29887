"""Rules and recipes: values that are whole from birth."""

import dataclasses

import pytest
from exact import W8
from jaxtyping import TypeCheckError
from methods import Informed, Smooth

import jaxquant as jq
from jaxquant.ops import Outliers


@pytest.mark.parametrize(
    "match, path, site, expected",
    [
        ("*", "a/b", "a/b#dot", True),
        ("a/b", "a/b", "a/b#dot", True),
        ("a/b", "a/b", "a/b#dot.1", True),
        ("a/b#dot", "a/b", "a/b#dot.1", False),
        ("a/b#dot*", "a/b", "a/b#dot.1", True),
        ("*#take", "a/b", "a/b#take", True),
        ("*#take", "a/b", "a/b#dot", False),
        ("layers/[0-3]/*", "layers/2/w", "layers/2/w#dot", True),
        ("layers/[0-3]/*", "layers/4/w", "layers/4/w#dot", False),
        ("B", "a/b", "a/b#dot", False),
        ("b", "a/b", "a/b#dot", False),
        ("A/B", "a/b", "a/b#dot", False),
    ],
)
def test_a_pattern_is_matched_with_a_whole_path_or_site(match, path, site, expected):
    assert jq.Rule(match=match).matches(path, site) == expected


def test_the_first_rule_wins():
    first, second = jq.Rule(match="a*"), jq.Rule(match="*", weights=W8)
    recipe = jq.Recipe(name="r", rules=(first, second))
    assert recipe.rule_for("ab", "ab#dot") is first
    assert recipe.rule_for("b", "b#dot") is second
    assert jq.Recipe(name="r", rules=(first,)).rule_for("b", "b#dot") is None


def test_incomplete_rules_are_refused():
    with pytest.raises(ValueError, match="quantizes activations but no weights"):
        jq.Rule(match="*", activations=W8)
    with pytest.raises(ValueError, match="elsewhere='ignore'"):
        jq.Rule(match="*", weights=W8, elsewhere="ignore")
    with pytest.raises(ValueError, match="has no rules"):
        jq.Recipe(name="r", rules=())


def test_rules_of_weights_and_rules_of_products_pass_each_other_by():
    weights, products = jq.Rule(match="*", weights=W8), jq.Rule(match="*", products=W8)
    recipe = jq.Recipe(name="r", rules=(weights, products))
    assert recipe.has_products and not jq.Recipe(name="r", rules=(weights,)).has_products
    assert recipe.rule_for("m", "m#product", product=True) is products
    assert recipe.rule_for("w", "w#dot") is weights
    left = jq.Rule(match="m")
    assert left.matches("m", "m#product", product=True) and left.matches("m", "m#dot")


STATIC8 = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"algorithm": Informed()}, "has the algorithm .* but no weights"),
        ({"scaling": Smooth()}, "has the scaling .* but no weights"),
        ({"algorithm": Informed(), "products": W8}, "has the algorithm .* but no weights"),
        ({"weights": W8, "static": True}, "is static but quantizes no activations"),
        ({"weights": W8, "activations": W8, "static": True}, "scales for each token"),
        (
            {
                "weights": W8,
                "static": True,
                "activations": dataclasses.replace(STATIC8, scale=W8),
            },
            "hold their scales as codes",
        ),
        (
            {
                "weights": W8,
                "static": True,
                "activations": dataclasses.replace(STATIC8, range=jq.ranges.AbsMean()),
            },
            "no observer keeps what the range AbsMean",
        ),
        ({"weights": W8, "outliers": Outliers()}, "nothing to keep them from"),
        (
            {"weights": W8, "activations": STATIC8, "static": True, "outliers": Outliers()},
            "leave out one of the two",
        ),
        (
            {
                "weights": W8,
                "outliers": Outliers(),
                "activations": dataclasses.replace(W8, range=jq.MinMax(), zero_point=jq.INT8),
            },
            "does not stand for 0",
        ),
        (
            {
                "weights": W8,
                "outliers": Outliers(),
                "activations": jq.Scheme(values=jq.formats.BINARY, tile=jq.PER_CHANNEL),
            },
            "does not stand for 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, said):
    with pytest.raises(ValueError, match=f"The rule '\\*' .*{said}"):
        jq.Rule(match="*", **fields)


def test_static_scales_of_the_whole_or_of_channels_are_permitted():
    for tile in (jq.PER_TENSOR, jq.Tile(contracted=1, kept=None)):
        scheme = dataclasses.replace(STATIC8, tile=tile)
        rule = jq.Rule(match="*", weights=W8, activations=scheme, static=True)
        assert rule.static and hash(rule)


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "informed"},
        {"algorithm": Informed},
        {"algorithm": Smooth()},
        {"scaling": Smooth},
        {"scaling": Informed()},
    ],
)
def test_what_is_no_algorithm_or_no_scaling_is_refused(fields):
    (what,) = fields
    with pytest.raises((TypeError, TypeCheckError), match=f"as its {what}|{what}"):
        jq.Rule(match="*", weights=W8, **fields)
