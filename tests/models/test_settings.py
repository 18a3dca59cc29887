"""Settings are of the kind that was asked for, or the file is refused."""

import pytest

from jaxquant.checkpoint import CheckpointError
from jaxquant.models._settings import Settings


def _settings(**values):
    return Settings(values, "config.json")


def test_values_have_the_kind_that_was_asked_for():
    settings = _settings(size=3, share=2, name="a", flag=True, none=None)
    assert settings.get("size", int) == 3 and settings.get("name", str) == "a"
    assert isinstance(settings.get("share", float), float)
    assert settings.get("none", int, 5) == 5 and settings.get("absent", str, "b") == "b"


@pytest.mark.parametrize(
    ("key", "kind", "problem"),
    [
        ("absent", int, "config.json has no absent"),
        ("flag", int, "flag is 'True', and a int was wanted"),
        ("size", bool, "size is '3', and a bool was wanted"),
        ("large", float, "large is too large for a float"),
    ],
)
def test_another_kind_is_refused(key, kind, problem):
    with pytest.raises(CheckpointError, match=problem):
        _settings(flag=True, size=3, large=10**400).get(key, kind)


def test_what_is_not_implemented_is_refused_where_it_is_stated():
    settings = _settings(act="relu", none=None)
    settings.require("none", "gelu")
    settings.require("absent", "gelu")
    settings.require("act", "gelu", "relu")
    with pytest.raises(
        CheckpointError, match="act is 'relu', which is not implemented; wanted 'ge"
    ):
        settings.require("act", "gelu")


@pytest.mark.parametrize("layers", [0, -1, 4, 10**30])
def test_no_more_layers_than_tensors(layers):
    settings = _settings(layers=layers)
    with pytest.raises(CheckpointError, match="and the file has 3 tensors"):
        settings.layers(["a", "b", "c"], "layers")


def test_the_complaint_of_a_config_is_one_of_the_file():
    def config(size):
        raise ValueError(f"size {size} is odd")

    with pytest.raises(CheckpointError, match="config.json: size 3 is odd"):
        _settings().build(config, size=3)
