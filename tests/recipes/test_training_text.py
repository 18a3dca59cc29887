"""How sites are trained, as text: there and back, and what is wrong is told with its place."""

import dataclasses

import pytest

from jaxquant.numerics import E4M3, E5M2
from jaxquant.qarray import PER_TENSOR, Scheme, schemes
from jaxquant.recipes import dump, parse
from jaxquant.training import Delayed, Training, WayBack

RULE = """
name = "mine"
[[rules]]
match = "*"
weights = "e4m3_block"
activations = "e4m3_block"
training = {{ way_back = {way_back} }}
"""


def read(way_back: str) -> WayBack | None:
    return parse(RULE.format(way_back=way_back)).rules[0].training.way_back


def test_a_way_back_is_read():
    assert read('{ gradients = "mxfp8_e5m2", from_codes = true }') == WayBack(
        gradients=schemes.MXFP8_E5M2, from_codes=True
    )
    tensor = '{ values = "e5m2", contracted = "all", kept = "all" }'
    found = read(f"{{ gradients = {tensor}, scaling = {{ delayed = {{ margin = 1 }} }} }}")
    assert found == WayBack(
        gradients=Scheme(values=E5M2, tile=PER_TENSOR), scaling=Delayed(margin=1)
    )


@pytest.mark.parametrize(
    "way_back",
    [
        WayBack(gradients=schemes.MXFP8_E5M2),
        WayBack(gradients=Scheme(values=E4M3, tile=PER_TENSOR), from_codes=True),
        WayBack(gradients=Scheme(values=E5M2, tile=PER_TENSOR), scaling=Delayed(history=16)),
    ],
    ids=str,
)
def test_what_is_written_is_read_again(way_back: WayBack):
    recipe = parse(RULE.format(way_back='{ gradients = "e4m3_block" }'))
    rule = dataclasses.replace(recipe.rules[0], training=Training(way_back=way_back))
    recipe = dataclasses.replace(recipe, rules=(rule,))
    assert parse(dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{ from_codes = true }", "way_back: a table that has at least `gradients`"),
        ('"e4m3_block"', "way_back: a table"),
        ('{ gradients = "e4m3_blok" }', "way_back, gradients: there is no 'e4m3_blok'"),
        ('{ gradients = "e4m3_block", from_code = true }', "nearest valid name is 'from_codes'"),
        ('{ gradients = "e4m3_block", from_codes = 1 }', "from_codes: true or false, not 1"),
        ('{ gradients = "e4m3_block", scaling = "lsq" }', "way_back, scaling"),
        ('{ gradients = "e4m3_block", scaling = "delayed" }', "PER_TENSOR"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, said: str):
    with pytest.raises(ValueError, match=r"rule 1 \('\*'\)") as caught:
        read(text)
    assert said in str(caught.value)


def test_an_estimator_that_does_not_fit_is_told():
    text = RULE.format(way_back='{ gradients = "e4m3_block" }').replace(
        "{ way_back", '{ weights = "lsq", way_back'
    )
    with pytest.raises(ValueError, match="pass gradients on as they are"):
        parse(text)
    with pytest.raises(ValueError, match="give it a way_back"):
        parse(
            'name = "x"\n[[rules]]\nmatch = "*"\ntraining = { weights = "delayed" }\n'
            'weights = { values = "e4m3", contracted = "all", kept = "all" }\n'
        )
