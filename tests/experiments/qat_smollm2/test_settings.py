import pytest
from qat_smollm2.one_row import named_run
from qat_smollm2.rows import cut, MADE, QUICK, ROWS, TRAINED
from qat_smollm2.settings import CONFIGS, read_run


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_row_has_settings(name: str):
    named = read_run(name)
    # 1,024 tokens a step, as the README says.
    assert named.run.loop.batch == 2 and named.run.loop.accumulation == 1
    assert (named.recipe is None) == (name == "full")
    assert named.run.start is None or named.run.start in MADE


def test_quick_rows_are_rows_and_have_settings_of_their_own():
    assert set(QUICK) < set(ROWS)
    for name in set(QUICK) & set(TRAINED):
        quick, full = named_run(name, True, None), read_run(name)
        assert quick.run.loop.steps < full.run.loop.steps
        assert quick.recipe is not None and full.recipe is not None
        assert quick.recipe.rules[-len(full.recipe.rules) :] == full.recipe.rules
        assert quick.recipe == cut(full.recipe)


def test_fewer_steps_have_a_warmup_that_fits():
    named = named_run("w2_qat", False, 5)
    assert named.run.loop.steps == 5 and named.run.optimizer.warmup == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distillation = 1.5\n", "a share from 0 to 1, not 1.5"),
        ("adapters = true\n", "adapters stand beside what a recipe rounds"),
        ("steps = 3\n", "there is no key 'steps'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, text, said):
    rest = 'what = "x"\n[loop]\nsteps = 1\nbatch = 1\n[optimizer]\nlearning_rate = 1e-3\n'
    (tmp_path / "a.toml").write_text(text + rest)
    with pytest.raises(ValueError, match=said):
        read_run("a", tmp_path)
    with pytest.raises(ValueError, match=r"no run 'b' .* Those that are: a\."):
        read_run("b", tmp_path)
    assert (CONFIGS / "quick").is_dir()
