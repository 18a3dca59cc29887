"""Algorithms and scalings as text: what is read is what was written, and errors say where."""

import pytest
from methods import ALGORITHMS, Free, Informed, Order, SCALINGS, Search, Smooth

import jaxquant as jq
from jaxquant import recipes
from jaxquant.ops import Outliers, OutlierWeights
from jaxquant.recipes import _algorithms


@pytest.fixture
def known(monkeypatch):
    for registry, kinds in ((_algorithms.ALGORITHMS, ALGORITHMS), (_algorithms.SCALINGS, SCALINGS)):
        for name, kind in kinds.items():
            monkeypatch.setitem(registry, name, kind)


MIDDLE = jq.AbsMax(convention=jq.Convention.MIDDLE)
CASES = [
    ("free", Free()),
    ({"free": {"rounds": 3}}, Free(rounds=3)),
    ("informed", Informed()),
    ({"informed": {"order": "falling"}}, Informed(order=Order.FALLING)),
    ({"informed": {"damping": 0.5, "careful": True}}, Informed(damping=0.5, careful=True)),
    ({"informed": {"blocks": "none"}}, Informed(blocks=None)),
    ({"informed": {"range": {"absmax": "middle"}}}, Informed(range=MIDDLE)),
    ({"informed": {"range": "minmax"}}, Informed(range=jq.MinMax())),
    ({"informed": {"search": "search"}}, Informed(search=Search())),
    ({"informed": {"search": {"search": {"steps": 4}}}}, Informed(search=Search(steps=4))),
]


@pytest.mark.parametrize("data, value", CASES, ids=[str(data) for data, _ in CASES])
def test_a_value_is_its_name_and_what_is_not_usual(data, value):
    assert _algorithms.value_to_data(value, ALGORITHMS) == data
    assert _algorithms.value_from_text(data, ALGORITHMS, "here") == value


@pytest.mark.parametrize("name", [*_algorithms.ALGORITHMS, *_algorithms.SCALINGS])
def test_every_algorithm_has_the_name_that_it_gives_itself(name):
    kinds = _algorithms.ALGORITHMS | _algorithms.SCALINGS
    value = _algorithms.value_from_text(name, kinds, "here")
    assert value.name == name and value == kinds[name]()
    assert _algorithms.value_to_data(value, kinds) == name


def test_several_numbers_are_a_list():
    data = {"smooth": {"alpha": [0.25, 1.0]}}
    assert _algorithms.value_from_text(data, SCALINGS, "here") == Smooth(alpha=(0.25, 1.0))
    assert _algorithms.value_to_data(Smooth(alpha=(0.25, 1.0)), SCALINGS) == data
    with pytest.raises(ValueError, match="here, smooth, alpha, 2: wanted float; got 'x'"):
        _algorithms.value_from_text({"smooth": {"alpha": [1.0, "x"]}}, SCALINGS, "here")


def test_a_whole_number_does_for_a_real_one():
    read = _algorithms.value_from_text({"informed": {"damping": 1}}, ALGORITHMS, "here")
    assert read == Informed(damping=1.0) and type(read.damping) is float


BAD = [
    ("fre", "there is no 'fre'; the nearest valid name is 'free' .all: informed, free"),
    ({"free": {"runds": 1}}, "here, free: there is no key 'runds'; the nearest .* 'rounds'"),
    ({"free": {"name": "x"}}, "there is no key 'name'"),
    ({"free": {"rounds": 1.0}}, "free, rounds: wanted int; got 1.0"),
    ({"free": {"rounds": True}}, "wanted int; got True"),
    ({"free": {"rounds": "none"}}, "wanted int; got 'none'"),
    ({"free": 3}, "settings are a table; got 3"),
    ({"free": {}, "informed": {}}, "a table with a name as its only key; got a table with free"),
    ({}, "a table with a name as its only key"),
    ({"informed": {"order": "fall"}}, "informed, order: there is no 'fall'; .*'falling'"),
    ({"informed": {"careful": 1}}, "wanted bool; got 1"),
    ({"informed": {"range": {"absmin": 1}}}, "informed, range: .*absmin"),
    ({"informed": {"range": "minmix"}}, "informed, range: there is no 'minmix'"),
    ({"informed": {"search": {"search": {"stepz": 1}}}}, "search, search: .* 'steps'"),
]


@pytest.mark.parametrize("text, said", BAD, ids=[str(text) for text, _ in BAD])
def test_an_error_says_where_and_what_would_have_been_valid(text, said):
    with pytest.raises(ValueError, match=f"here.*{said}|{said}"):
        _algorithms.value_from_text(text, ALGORITHMS, "here")


def test_what_has_no_name_cannot_be_written():
    with pytest.raises(ValueError, match="has no name as text; those that do are smooth"):
        _algorithms.value_to_data(Free(), SCALINGS)
    with pytest.raises(ValueError, match="there is no 'free'; none is known here"):
        _algorithms.value_from_text("free", {}, "here")


TEXT = """
name = "r"

[[rules]]
match = "*"
weights = "int8_channel"
activations = { values = "int8", contracted = "all", kept = "all" }
algorithm = { informed = { order = "falling", damping = 0.1 } }
scaling = { smooth = { alpha = 0.8 } }
static = true

[[rules]]
match = "b"
weights = "int8_channel"
activations = "int8_channel"
outliers = { threshold = 5.0, weights = "original" }

[[rules]]
match = "c"
weights = "int8_channel"
activations = "int8_channel"
algorithm = "free"
outliers = {  }
"""


def test_a_recipe_with_all_of_it_reads_and_writes(known):
    recipe = recipes.parse(TEXT)
    first, second, third = recipe.rules
    assert first.algorithm == Informed(order=Order.FALLING, damping=0.1)
    assert first.scaling == Smooth(alpha=0.8) and first.static
    assert second.outliers == Outliers(threshold=5.0, weights=OutlierWeights.ORIGINAL)
    assert third.outliers == Outliers() and third.algorithm == Free()
    text = recipes.dump(recipe)
    assert recipes.parse(text) == recipe
    assert text.strip() == TEXT.strip()


@pytest.mark.parametrize(
    "line, said",
    [
        (
            'algorithm = "infromed"',
            "rule 1 .'\\*'., algorithm: there is no 'infromed'; .* 'informed'",
        ),
        ("algorithm = 1", "rule 1 .'\\*'., algorithm: .*int"),
        ("outliers = { treshold = 6 }", "rule 1 .*, outliers: .*'treshold'; .*'threshold'"),
        ("outliers = { threshold = -1.0 }", "outliers: Outliers reach a magnitude"),
        ("outliers = { threshold = 6.0 }\nstatic = true", "static"),
        ('static = "yes"', "static: .*bool"),
    ],
)
def test_errors_in_a_recipe_say_which_rule(known, line, said):
    rule = '[[rules]]\nmatch = "*"\nweights = "int8_channel"\nactivations = "int8_channel"'
    with pytest.raises(ValueError, match=said):
        recipes.parse(f'name = "r"\n{rule}\n{line}\n')
