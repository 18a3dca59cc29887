"""Recipes as text: what is read is what was written, and what is wrong is said where it stands."""

# ruff: noqa: E501 (a case is a line)

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant import recipes
from jaxquant.intercept import Recipe, Rule
from jaxquant.numerics import AbsMax, BFLOAT16, Convention, FLOAT16, FORMATS, INT4, INT8, MinMax
from jaxquant.qarray import PER_CHANNEL, Scheme, Tile

GOOD = """
name = "mine"
source = "a paper"

[[rules]]
match = "*embed*"
leave = true
optional = true

[[rules]]
match = "*"
weights = { values = "int4", contracted = 64, kept = 2, scale = "bfloat16", range = { absmax = "middle" } }
activations = { values = "int8", contracted = "all" }
elsewhere = "dequantize"
"""


def test_a_recipe_reads_as_the_value_that_it_describes():
    weights = Scheme(
        values=INT4,
        tile=Tile(contracted=64, kept=2),
        scale=BFLOAT16,
        range=AbsMax(convention=Convention.MIDDLE),
    )
    assert recipes.parse(GOOD) == Recipe(
        name="mine",
        source="a paper",
        rules=(
            Rule(match="*embed*", optional=True),
            Rule(
                match="*",
                weights=weights,
                activations=Scheme(values=INT8, tile=PER_CHANNEL),
                elsewhere="dequantize",
            ),
        ),
    )


def test_an_asymmetric_scheme_reads_with_its_zero_point():
    text = 'values = "int4"\ncontracted = 32\nrange = "minmax"\nzero_point = "int8"'
    recipe = recipes.parse(f'name = "a"\n[[rules]]\nmatch = "*"\n[rules.weights]\n{text}')
    scheme = Scheme(values=INT4, tile=Tile(contracted=32), range=MinMax(), zero_point=INT8)
    assert recipe.rules[0].weights == scheme


# What is changed in GOOD, into what, and what the error has to say.
BAD = {
    "unknown key at the top": ('source = "a', 'sorce = "a', ["'sorce'", "'source'"]),
    "unknown key in a rule": ("optional = true", "opitonal = true", ["rule 1 ('*embed*')", "'optional'"]),
    "unknown key in a scheme": ("contracted = 64", "contarcted = 64", ["rule 2 ('*')", "weights", "'contracted'"]),
    "unknown key in a range": ("{ absmax =", "{ absmin =", ["rule 2 ('*')", "range", "absmax"]),
    "unknown format": ('"int4"', '"int9"', ["weights, values", "'int9'", "nearest valid name is 'int"]),
    "unknown scale format": ('"bfloat16"', '"bfloat17"', ["weights, scale", "'bfloat16'"]),
    "unknown convention": ('"middle"', '"midle"', ["absmax", "'midle'", "'middle'"]),
    "unknown range": ('{ absmax = "middle" }', '"minmx"', ["range", "'minmax'"]),
    "unknown elsewhere": ('"dequantize"', '"dequant"', ["rule 2 ('*')", "'dequantize'"]),
    "text for a number": ("contracted = 64", 'contracted = "64"', ["rule 2 ('*'), weights.contracted", "'all'"]),
    "a float for an integer": ("contracted = 64", "contracted = 64.0", ["weights.contracted", "float"]),
    "a truth value for an integer": ("kept = 2", "kept = true", ["weights.kept", "bool"]),
    "a number for text": ('name = "mine"', "name = 1", [", name", "str"]),
    "a tile of none": ("contracted = 64", "contracted = 0", ["rule 2 ('*'), weights", "at least 1"]),
    "a missing key": ('match = "*"\n', "", ["rule 2", "`match`"]),
    "a missing tile": ('{ values = "int8", contracted = "all" }', '{ values = "int8" }', ["activations", "`contracted`"]),
    "a scale of 8 bits": ('"bfloat16"', '"int8"', ["weights", "Scales are held as"]),
    "a range without its zero point": ('{ absmax = "middle" }', '"minmax"', ["weights", "zero point"]),
    "a rule that says nothing": ("leave = true\n", "", ["rule 1 ('*embed*')", "neither"]),
    "a rule that says two things": ('elsewhere = "dequantize"', "leave = true", ["rule 2", "both"]),
    "no TOML": ("[[rules]]", "[[rules", ["not TOML", "line"]),
    "rules that are a table": ("[[rules]]\nmatch = \"*embed*\"\nleave = true\noptional = true\n\n[[rules]]", "[rules]", ["rules", "array"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_error_says_where_and_what_would_have_been_valid(case: str, tmp_path):
    old, new, wanted = BAD[case]
    assert old in GOOD
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        recipes.load(path)
    assert "\n" not in str(error.value)
    for words in [*wanted, str(path)]:
        assert words in str(error.value)


def test_activations_at_a_site_that_is_left_are_refused():
    scheme = '{ values = "int8", contracted = "all" }'
    with pytest.raises(ValueError, match="rule 1.*beside `leave = true`"):
        recipes.parse(f'name = "a"\n[[rules]]\nmatch = "*"\nleave = true\nactivations = {scheme}')


def test_a_recipe_without_rules_is_refused():
    with pytest.raises(ValueError, match="the recipe: .*no rules"):
        recipes.parse('name = "a"\nrules = []')


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"name = \xff")
    with pytest.raises(ValueError, match="a.toml is not UTF-8"):
        recipes.load(tmp_path / "a.toml")


SIZES = st.none() | st.integers(1, 4096)
SYMMETRIC = st.builds(
    Scheme,
    values=st.sampled_from([INT4, INT8]),
    tile=st.builds(Tile, contracted=SIZES, kept=SIZES),
    scale=st.sampled_from([row for row in FORMATS.values() if row.bits >= 16]),
    range=st.builds(AbsMax, convention=st.sampled_from(Convention)),
)
ASYMMETRIC = st.builds(
    Scheme,
    values=st.just(INT4),
    tile=st.builds(Tile, contracted=SIZES, kept=SIZES),
    range=st.just(MinMax()),
    zero_point=st.sampled_from([INT4, INT8, FLOAT16]),
)
SCHEMES = SYMMETRIC | ASYMMETRIC
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
# A rule's fields rather than a Rule: jaxtyping's checks draw random numbers, which hypothesis
# does not allow while it makes examples.
RULES = st.fixed_dictionaries(
    {"match": TEXTS, "optional": st.booleans()},
    optional={
        "weights": st.sampled_from([0, 1]),
        "activations": st.sampled_from([0, 1]),
        "elsewhere": st.sampled_from(["error", "dequantize"]),
    },
).filter(lambda rule: "weights" in rule or "activations" not in rule)


@hypothesis.given(
    TEXTS, TEXTS, st.lists(RULES, min_size=1, max_size=3), st.tuples(SCHEMES, SCHEMES)
)
def test_a_recipe_written_and_read_is_the_same(
    name: str, source: str, rules: list[dict], schemes: tuple[Scheme, Scheme]
):
    def made(fields: dict) -> Rule:
        roles = {
            role: schemes[fields[role]] for role in ("weights", "activations") if role in fields
        }
        return Rule(**(fields | roles))

    recipe = Recipe(name=name, source=source, rules=tuple(map(made, rules)))
    assert recipes.parse(recipes.dump(recipe)) == recipe


@hypothesis.given(SCHEMES)
def test_a_scheme_as_plain_data_and_back_is_the_same(scheme: Scheme):
    assert recipes.scheme_from_dict(recipes.scheme_to_dict(scheme), where="here") == scheme


INT8_TEXT = '{ values = "int8", contracted = "all" }'


def test_products_are_read_and_written():
    scheme = Scheme(values=INT8, tile=PER_CHANNEL)
    recipe = Recipe(
        name="r",
        rules=(Rule(match="*attention*#product*", products=scheme), Rule(match="*")),
    )
    text = recipes.dump(recipe)
    assert 'products = "int8_channel"' in text
    assert recipes.parse(text) == recipe


@pytest.mark.parametrize(
    "keys, message",
    [
        ("leave = true", "`products` beside `leave = true`"),
        (f"weights = {INT8_TEXT}", "weights and products of activations"),
    ],
)
def test_products_stand_alone(keys, message):
    text = f'name = "r"\n[[rules]]\nmatch = "*"\nproducts = {INT8_TEXT}\n{keys}\n'
    with pytest.raises(ValueError, match=message):
        recipes.parse(text)
