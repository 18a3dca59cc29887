import pytest
from jaxtyping import TypeCheckError

from jaxquant.calibrate import Settings


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"inputs": "float"}, "'float' is not one of"),
        ({"narrow": "int8"}, "no dtype of floats"),
        ({"least_share": -3.0}, "not between 0 and 1"),
        ({"memory": -1}, "memory=-1 is below 0"),
        ({"sample": 0}, "sample=0 is below 1"),
        ({"unit": 0}, "unit=0 is below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, said):
    with pytest.raises((ValueError, TypeCheckError), match=f"{said}|inputs"):
        Settings(**fields)
