"""The order of rows: nobody starts before what it starts from, or learns from, is there."""

import pytest
from small_lm.run import CALIBRATED, phases, QUICK, TRAINED
from small_lm.settings import CONFIGS, read_run


@pytest.mark.parametrize(
    ("names", "configs"),
    [((*TRAINED, *CALIBRATED), CONFIGS), (QUICK, CONFIGS / "quick"), (("int4",), CONFIGS)],
)
def test_what_a_row_needs_is_made_in_an_earlier_phase(names, configs):
    *made, again = phases(list(names), configs)
    assert sorted(name for phase in made for name in phase) == sorted(names)
    before = {"float32"} - {*names}
    for phase in made:
        for name in phase:
            needs = ("float32",) if name in CALIBRATED else read_run(name, configs).needs
            assert {*needs} & {*names} <= before
        before |= {*phase}
    # Whoever was made beside the float model is compared with it afterwards.
    assert again == ([n for n in made[0] if n != "float32"] if "float32" in names else [])
