"""Names in texts."""

import pytest

from jaxquant.recipes._names import known, nearest


def test_the_nearest_name_is_the_one_that_looks_most_alike():
    assert nearest("int9", ["float32", "int8", "nf4"]) == "int8"


def test_a_known_name_comes_back_and_an_unknown_one_is_answered_with_the_others():
    assert known("nf4", ["nf4", "fp4"], "here") == "nf4"
    with pytest.raises(ValueError, match=r"here: there is no 'nf5'.*'nf4' or so \(all: nf4, int8"):
        known("nf5", ["nf4", "int8"], "here", instead=" or so")
