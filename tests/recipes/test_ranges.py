"""Range rules as text: each reads back as the value that it was written from."""

import pytest

from jaxquant import recipes
from jaxquant.intercept import Recipe, Rule
from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    BINARY,
    Convention,
    E4M3,
    E8M0,
    ExponentRule,
    Fixed,
    INT4,
    INT8,
    MeanSquaredError,
    MinMax,
    Percentile,
    RootMeanSquare,
    SharedExponent,
)
from jaxquant.qarray import PER_CHANNEL, Scheme, schemes, Tile

MIDDLE = Convention.MIDDLE
SYMMETRIC = {
    '{ absmax = "lowest" }': AbsMax(convention=Convention.LOWEST),
    "{ percentile = 99.9 }": Percentile(percent=99.9),
    '{ percentile = 99.5, convention = "middle" }': Percentile(percent=99.5, convention=MIDDLE),
    '{ rms = 3.0, convention = "middle" }': RootMeanSquare(multiple=3.0, convention=MIDDLE),
    "{ fixed = [-1.0, 2.0] }": Fixed(low=-1.0, high=2.0),
    '{ mse = { absmax = "middle" }, grid = 50 }': MeanSquaredError(
        base=AbsMax(convention=MIDDLE), grid=50
    ),
}
ASYMMETRIC = {
    '"minmax"': MinMax(),
    '"minmax_apart"': MinMax(include_zero=False),
    '{ mse = "minmax", shrink = 0.5, power = 2.0 }': MeanSquaredError(
        base=MinMax(), shrink=0.5, power=2.0
    ),
}
SCHEMES = {
    **{text: Scheme(values=INT4, tile=PER_CHANNEL, range=r) for text, r in SYMMETRIC.items()},
    **{
        text: Scheme(values=INT4, tile=PER_CHANNEL, range=r, zero_point=INT8)
        for text, r in ASYMMETRIC.items()
    },
    '{ shared_exponent = "ceil" }': Scheme(
        values=E4M3,
        tile=Tile(contracted=100, ragged=True),
        scale=E8M0,
        range=SharedExponent(rule=ExponentRule.CEIL),
    ),
    "{ absmean = 1.5 }": Scheme(values=BINARY, tile=PER_CHANNEL, range=AbsMean(multiple=1.5)),
}


def _recipe(scheme: Scheme) -> Recipe:
    return Recipe(name="a", rules=(Rule(match="*", weights=scheme),))


@pytest.mark.parametrize("text", SCHEMES)
def test_a_scheme_is_written_with_its_range_and_read_back(text: str):
    written = recipes.dump(_recipe(SCHEMES[text]))
    assert f"range = {text}" in written
    assert recipes.parse(written) == _recipe(SCHEMES[text])


@pytest.mark.parametrize("name", schemes.NAMED)
def test_a_named_scheme_is_written_by_name_and_kept_whole_as_data(name: str):
    scheme = schemes.NAMED[name]
    written = recipes.dump(_recipe(scheme))
    assert f'weights = "{name}"' in written
    assert recipes.parse(written) == _recipe(scheme)
    data = recipes.scheme_to_dict(scheme)
    assert recipes.scheme_from_dict(data, where="here") == scheme


WRONG = {
    "{ percentile = 99.9, rms = 2.0 }": "got percentile, rms",
    '{ convention = "middle" }': "got none of them",
    "{ absmean = 1.0, grid = 3 }": "'grid' does not belong to the range 'absmean'",
    '{ rms = 2.0, convention = "midle" }': "convention: there is no 'midle'.*'middle'",
    '{ shared_exponent = "round" }': "shared_exponent: there is no 'round'",
    "{ mse = { rms = 2.0 } }": "mse: the range that is shrunk is absmax or minmax",
    "{ percentile = 0.0 }": "more than 0 and at most 100",
    "{ fixed = [1.0, 2.0] }": "low <= 0 <= high",
    "{ fixed = [1.0] }": "fixed",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_said_where_it_stands(text: str):
    recipe = 'name = "a"\n[[rules]]\nmatch = "*"\n[rules.weights]\nvalues = "int4"\n'
    with pytest.raises(ValueError, match=rf"rule 1 \('\*'\), weights.*{WRONG[text]}"):
        recipes.parse(recipe + f'contracted = "all"\nrange = {text}')
