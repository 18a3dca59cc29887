"""Rules and recipes: values that are whole from birth."""

import pytest
from exact import W8

import jaxquant as jq


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
