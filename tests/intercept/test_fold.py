import numpy as np
import pytest

from jaxquant.intercept._fold import Fold, SiteRef, Source, tie
from jaxquant.intercept._mark import Root


def fold_of(*, sources=("norm/scale",), sites=("q/kernel",), channels=None, shape=(4,)):
    numbers = np.arange(4, dtype=np.int32)
    return Fold(
        sources=tuple(Source(root=Root(path=path), channels=numbers) for path in sources),
        sites=tuple(
            SiteRef(site=f"{path}#dot", root=Root(path=path), channels=numbers) for path in sites
        ),
        shape=shape,
        channels=None if channels is None else np.asarray(channels, np.int32),
    )


@pytest.mark.parametrize(
    "sources, sites, line",
    [
        (["n/scale"], ["a/q/kernel", "a/k/kernel"], "n/scale -> a/{q,k}/kernel"),
        (["n/scale", "n/bias"], ["a/q/kernel"], "n/{scale,bias} -> a/q/kernel"),
        (["n/scale"], ["router/kernel", "experts/up"], "n/scale -> router/kernel, experts/up"),
        (["scale"], ["q", "k"], "scale -> q, k"),
        (["n/scale"], ["a/b/kernel", "c/b/kernel"], "n/scale -> {a,c}/b/kernel"),
        (["n/scale"], ["a/b/kernel", "c/d/kernel"], "n/scale -> a/b/kernel, c/d/kernel"),
        (["n/scale"], ["q/kernel", "q/kernel"], "n/scale -> q/kernel"),
    ],
)
def test_a_fold_is_one_line(sources, sites, line):
    assert str(fold_of(sources=sources, sites=sites)) == line


def test_factors_of_a_class_become_one():
    fold = fold_of(channels=[0, 1, 0, -1])
    s = np.asarray([1.0, 3.0, 4.0, 7.0], np.float32)
    # Through logarithms in float64: exact but for the last rounding.
    np.testing.assert_allclose(tie(s, fold), [2, 3, 2, 1], rtol=2e-7)
    np.testing.assert_array_equal(tie(s, fold, largest=True), [4, 3, 4, 1])


def test_classes_go_across_the_stack_where_channels_say_so():
    fold = fold_of(channels=[[0, 1], [0, 3]], shape=(2, 2))
    s = np.asarray([[1.0, 3.0], [4.0, 7.0]], np.float32)
    np.testing.assert_array_equal(tie(s, fold, largest=True), [[4, 3], [4, 7]])


def test_without_classes_factors_stay():
    s = np.asarray([1.0, 3.0, 4.0, 7.0], np.float32)
    np.testing.assert_array_equal(tie(s, fold_of()), s)


def test_factors_have_the_shape_of_the_fold_and_are_positive():
    with pytest.raises(ValueError, match=r"norm/scale -> q/kernel takes factors \(4,\), not \(7,"):
        tie(np.ones(7, np.float32), fold_of())
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"at \[2\]. Factors have to be positive and finite"):
            tie(np.asarray([1, 1, bad, 1], np.float32), fold_of())
