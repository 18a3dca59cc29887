"""Sides take turns, warm-ups do not count, and ratios are of neighbours in time."""

import pytest

from jaxquant.evaluate import medians, Timing


def test_sides_take_turns_in_alternating_order():
    calls = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = medians(sides, rounds=3, warmups=1)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_medians_and_ratios_by_hand():
    ours, theirs = Timing(seconds=(1.0, 2.0, 9.0)), Timing(seconds=(2.0, 4.0, 9.0))
    assert ours.median == 2.0
    assert ours.ratio(theirs) == 2.0
    assert ours.ratio(ours) == 1.0


def test_progress_counts_rounds_and_warm_ups():
    seen = []
    medians({"a": lambda: None}, rounds=2, warmups=1, progress=lambda *x: seen.append(x))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("sides", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_time_is_refused(sides, rounds):
    with pytest.raises(ValueError, match="at least one of each"):
        medians(sides, rounds=rounds)
