import math

import pytest
from fp8_training.claims import as_table, BASE, broken, differences, MOST


def rows(**nll):
    return [
        {"arithmetic": name, "seed": seed, "nll": value}
        for name, values in nll.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_paired_by_seed():
    found = differences(rows(bfloat16=[4.0, 2.0], fp8_train_block=[4.04, 2.04]))
    block = found[1]
    assert block.percent == pytest.approx(1.5) and block.error == pytest.approx(0.5)
    assert block.nll == pytest.approx(3.04)
    assert "+1.500 ± 0.500 %" in as_table(found)


def test_seeds_that_bfloat16_has_not_do_not_count():
    found = differences(rows(bfloat16=[4.0], fp8_train_block=[4.0, 9.0]))
    assert [each.seeds for each in found] == [1, 1]


@pytest.mark.parametrize("name", MOST)
def test_what_is_within_the_limit_is_silent_and_what_is_not_is_named(name: str):
    base = [4.0, 4.0, 4.0]
    good = [4.0 * (1 + MOST[name] / 100)] * 3
    worse = [4.0 * (1.001 + MOST[name] / 100)] * 3
    assert broken(differences(rows(**{BASE: base, name: good})), quick=False) == []
    for bad in (worse, [math.nan] * 3):
        (said,) = broken(differences(rows(**{BASE: base, name: bad})), quick=False)
        assert said.startswith(name)


def test_a_single_seed_and_a_large_error_are_told():
    one = differences(rows(**{BASE: [4.0], "fp8_train_block": [4.0]}))
    assert "one seed" in broken(one, quick=False)[0]
    assert broken(one, quick=True) == []
    wide = differences(rows(**{BASE: [4.0, 4.0], "fp8_train_block": [3.9, 4.1]}))
    assert "more seeds" in broken(wide, quick=False)[0]
