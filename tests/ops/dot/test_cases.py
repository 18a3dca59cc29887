"""Cases are real shapes; cut down, they keep what makes them different."""

import pytest

from jaxquant.ops.dot._cases import Case, CASES, cut_down, DECODE, HELD, linear_of, MODELS, SHAPES
from jaxquant.qarray import abstract_qarray

SMALL = 12 << 20


def test_shapes_are_those_of_the_models():
    found = {(linear.k, linear.n) for linear in SHAPES}
    assert len(found) == len(SHAPES)
    assert {(4096, 14336), (28672, 8192), (5120, 25600), (576, 192), (4096, 512)} <= found
    cut = {linear.part: linear for linear in MODELS["Llama-3 8B over 8"]}
    whole = {linear.part: linear for linear in MODELS["Llama-3 8B"]}
    for part, linear in whole.items():
        assert cut[part].k * cut[part].n * 8 == linear.k * linear.n


def test_a_shape_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match="No model of the cases has a linear of 3x4"):
        linear_of(3, 4)


def test_every_format_is_there_and_no_case_twice():
    assert len(set(CASES)) == len(CASES)
    assert {case.held.name for case in CASES} == set(HELD)
    assert {case.rows for case in CASES} >= {*DECODE, 512, 2048, 8192}


@pytest.mark.parametrize("name", HELD)
def test_weights_can_be_held_so(name):
    held = HELD[name]
    for k in (576, 4096):
        scheme = held.of(k).weights
        q = abstract_qarray((k, 256), "float32", scheme, contracted=(0,))
        assert q.shape == (k, 256) and (k == 576 or scheme == held.weights)


def _traits(case: Case) -> tuple[bool, ...]:
    k, n, group = case.linear.k, case.linear.n, case.scheme.tile.contracted
    return (
        group is not None and k % group != 0,
        group is not None and k > group,
        k > 8192,
        case.rows > 128,
        n % 128 != 0,
        # Packed blocks are as wide as 1,024 columns.
        n % 1024 != 0,
        k % 128 != 0,
    )


@pytest.mark.parametrize("name", HELD)
def test_small_cases_are_of_the_same_kind(name):
    for case in (case for case in CASES if case.held.name == name):
        small = cut_down(case)
        assert _traits(small) == _traits(case), case
        assert small.linear.k * small.linear.n <= SMALL and small.rows <= 136
        assert (small.held, small.dtype) == (case.held, case.dtype)
        # Several blocks of columns, but where there are several along k.
        if case.linear.n > 1024 and case.linear.k <= 8192:
            assert small.linear.n > 1024
