import pytest
from qat_smollm2.claims import broken, CONVERTED, FLOAT_SITES, RECOVERED, recovered, slow, STEP_TIME
from qat_smollm2.table import everything


def trained(nll: float, **changes):
    held = {"trained": 1, "optimizer": 2, "fixed": 0, "temporary": 5, "peak_rss": 9}
    return {
        "nll": nll,
        "nll_difference": nll - 3.0,
        "trained_nll": nll,
        "cli_nll": nll,
        "losses": {"first": 1.0, "last": 0.5},
        "sites": {"a": 0.0},
        "memory": held,
    } | changes


def rows(**changes):
    """Rows for which everything holds, with some changed."""
    full = trained(
        3.0, memory={**trained(3.0)["memory"], "trained": 7, "optimizer": 8, "peak_rss": 99}
    )
    found = {
        "w4a8_round": {"nll": 4.0, "nll_difference": 1.0},
        "w4a8_qat": trained(3.2),
        "w2_round": {"nll": 13.0, "nll_difference": 10.0},
        "w2_gptq": {"nll": 5.0, "nll_difference": 2.0},
        "w2_qat": trained(4.5, sites={"a": 1e-7}),
        "qlora": trained(3.1, codes_unchanged=True),
        "full": full,
    }
    return found | changes


@pytest.mark.parametrize("quick", [False, True])
def test_claims_that_hold_are_silent(quick: bool):
    assert broken(rows(), quick=quick) == []
    assert slow(STEP_TIME) == []


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("w4a8_qat", trained(3.51), "of what w4a8_round loses"),
        ("w4a8_qat", trained(float("nan")), "of what w4a8_round loses"),
        ("w2_qat", trained(5.01), "w2_gptq 5.0000"),
        ("w2_qat", trained(4.5, cli_nll=4.5 + 2 * CONVERTED), "by the command line"),
        ("w4a8_qat", trained(3.2, sites={"a": 0.0, "b": 1e-9}), "1 sites differ"),
        ("w2_qat", trained(4.5, sites={"a": 2 * FLOAT_SITES}), "1 sites differ"),
        ("qlora", trained(3.1, codes_unchanged=False), "frozen codes changed"),
        ("qlora", trained(3.1, losses={"first": 1.0, "last": 1.0}), "the loss went"),
        ("qlora", trained(3.1, memory={**trained(3.0)["memory"], "optimizer": 8}), "optimizer 8"),
    ],
)
def test_each_claim_that_does_not_hold_is_told(name, row, said):
    found = broken(rows(**{name: row}), quick=False)
    assert any(said in each and each.startswith(name) for each in found), found


def test_steps_that_are_too_slow_are_told():
    assert "1.160 times" in slow(1.16)[0]


def test_recovered_is_a_share_of_what_rounding_loses():
    assert recovered(trained(3.25), {"nll_difference": 1.0}) == pytest.approx(0.75)
    assert set(RECOVERED[True]) == set(RECOVERED[False])


def test_the_table_has_a_line_a_row():
    common = {"what": "b", "bits_per_weight": 4.0, "kl": 0.1, "top1": 0.5, "flipped_argmax": 0.001}
    given = {name: {"name": name, **common, **row} for name, row in rows().items()}
    text = everything(given)
    assert "| `w4a8_qat`: b | 4.000 | 3.2000 | +0.2000 | 80% | 0.1000 | 50.0% |  |  |" in text
    assert "| `w2_qat` | 4.500000 | 4.500000 | 0.100% |  | 0 of 1 | 1.0e-07 |" in text
    assert text.count("`qlora`") == 3
