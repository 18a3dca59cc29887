import pytest
from small_lm.run import CALIBRATED, QUICK, TRAINED
from small_lm.settings import CONFIGS, read_run, read_shared
from training_loop.settings import check

import jaxquant as jq

FILES = sorted(p for p in CONFIGS.rglob("*.toml") if p.stem != "model" and "recipes" not in p.parts)


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_file_is_a_run_whose_recipe_can_be_read(file):
    named = read_run(file.stem, file.parent)
    check(named.run.loop, named.run.optimizer, named.run.devices)
    if named.run.recipe is not None:
        rules = jq.recipes.load(file.parent / named.run.recipe).rules
        assert any(rule.training is not None for rule in rules)
    order = QUICK if file.parent.name == "quick" else TRAINED
    assert all(order.index(need) < order.index(file.stem) for need in named.needs)


def test_rows_that_stand_side_by_side_took_as_many_steps_on_the_same_data():
    float32, *others = (read_run(n).run.loop for n in ("float32", "int4", "bitnet"))
    assert others == [float32, float32]


def test_every_row_of_the_table_is_there():
    assert {p.stem for p in FILES if p.parent == CONFIGS} == set(TRAINED)
    assert {p.stem for p in FILES if p.parent != CONFIGS} == set(QUICK) - set(CALIBRATED)
    with pytest.raises(ValueError, match=r"no run 'float'\. Those that are: asym_qat"):
        read_run("float")


def test_groups_and_blocks_fit_the_model():
    model = read_shared().model
    sizes = (model.width, model.hidden, model.heads * model.head_dim)
    assert all(size % 256 == 0 for size in sizes)
