import pytest
from small_lm.claims import ABOVE_FLOAT, broken, CONVERTED, RATIOS
from small_lm.table import line


def trained(**changes):
    return {"nll": 3.0, "trained_nll": 3.0, "guess_nll": 7.6, "nll_difference": 0.0} | changes


@pytest.mark.parametrize("quick", [False, True])
def test_claims_that_hold_are_silent_and_others_are_not(quick: bool):
    good = {name: trained() for name in ABOVE_FLOAT[quick]}
    pairs = {name for pair in RATIOS[quick] for name in pair}
    good |= {name: {"kl": 1.0} for name in pairs}
    for (ours, other), _ in RATIOS[quick].items():
        good[ours] = good[ours] | {"kl": 0.1 * good[other]["kl"]}
    assert broken(good, quick=quick) == []
    for name, most in ABOVE_FLOAT[quick].items():
        worse = good | {name: trained(nll_difference=most + 0.01)}
        assert [said.partition(":")[0] for said in broken(worse, quick=quick)] == [name]
    for ours, other in RATIOS[quick]:
        worse = good | {ours: {"kl": 2.0}, other: {"kl": 1.0}}
        assert any(said.startswith(f"{ours}: KL") for said in broken(worse, quick=quick))


@pytest.mark.parametrize(
    "row",
    [
        trained(trained_nll=3.0 + 2 * CONVERTED),
        trained(nll=7.0, trained_nll=7.0),
        trained(nll_difference=float("nan")),
    ],
)
def test_rows_that_learned_nothing_or_were_converted_to_something_else_are_named(row):
    assert len(broken({"int4": row}, quick=False)) == 1


def test_a_row_of_the_table():
    row = {
        "name": "a", "what": "b", "nll": 3.25, "nll_difference": 0.5, "nll_difference_stderr": 0.1,
        "bits_per_byte": 1.5, "bits_per_weight": 5.0, "bytes": 3_000_000, "kl": None, "top1": 0.5,
    }  # fmt: skip
    assert (
        line(row)
        == "| `a`: b | 3.2500 | +0.5000 ± 0.1000 |  | 50.0% | 1.500 | 5.000 | 3.00 |  |  |"
    )
