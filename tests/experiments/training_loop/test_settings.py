import pytest
from training_loop import Devices, Loop, Optimizer, read_settings, Settings, typed
from training_loop.settings import check


class Whole(Settings):
    loop: Loop
    optimizer: Optimizer
    extra: Devices | None = None


def test_a_file_is_read_strictly(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[loop]\nsteps = 5\nbatch = 2\n[optimizer]\nlearning_rate = 1\n")
    found = read_settings(file, Whole)
    assert found.loop == Loop(steps=5, batch=2) and found.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    "data, said",
    [
        ({"loops": {}}, "there is no key 'loops'; the nearest valid one is 'loop'"),
        (
            {"loop": {"step": 5, "batch": 2}},
            "x, loop: there is no key 'step'; the nearest valid one is 'steps'",
        ),
        ({"loop": {"steps": "5", "batch": 2}}, r"x, loop\.steps: Expected `int`, got `str`"),
        ({"loop": {"steps": 5}}, "x, loop: .*missing required field `batch`"),
        (
            {"optimizer": {"learning_rate": 1.0, "groups": {"a": {"rates": 1.0}}}},
            "x, optimizer, groups, a: there is no key 'rates'; the nearest valid one is 'rate'",
        ),
        ({"extra": {"fsdps": 1}}, "x, extra: there is no key 'fsdps'"),
        (
            {"optimizer": {"learning_rate": 1.0, "schedule": "cosin"}},
            r"x, optimizer\.schedule: Invalid enum value 'cosin'",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(data, said: str):
    usual = {"loop": {"steps": 5, "batch": 2}, "optimizer": {"learning_rate": 1.0}}
    with pytest.raises(ValueError, match=said):
        typed(usual | data, Whole, "x")


def test_what_is_no_toml_is_said(tmp_path):
    (tmp_path / "a.toml").write_text("loop = [")
    with pytest.raises(ValueError, match=r"a\.toml is not TOML"):
        read_settings(tmp_path / "a.toml", Whole)


@pytest.mark.parametrize(
    "loop, optimizer, devices, said",
    [
        ({"steps": 0}, {}, {}, r"loop\.steps is 0"),
        ({"batch": 6, "accumulation": 4}, {}, {}, "Give a multiple of 4"),
        ({"accumulation": 2}, {}, {"data": 2, "fsdp": 2}, "2 parts on 4 devices.* multiple of 8"),
        ({}, {"warmup": 10}, {}, "warmup is 10 of 10 steps"),
        ({}, {"learning_rate": 0.0}, {}, "learning_rate is 0.0"),
        ({}, {"learning_rate": float("nan")}, {}, "learning_rate is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(loop, optimizer, devices, said: str):
    with pytest.raises(ValueError, match=said):
        check(
            Loop(**({"steps": 10, "batch": 4} | loop)),
            Optimizer(**({"learning_rate": 1e-3} | optimizer)),
            Devices(**devices),
        )
