"""A tiny model and its quantized folder, and the command line as a function.

Nothing here may import jaxquant: see tests/conftest.py.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import pytest
import tiny_llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def jaxquant(capsys) -> Callable[..., Ran]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ran:
        from jaxquant.cli import main

        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    return tiny_llama.write_folder(tmp_path / "model")


@pytest.fixture
def tokens(tmp_path) -> pathlib.Path:
    return tiny_llama.write_tokens(tmp_path / "tokens.npz")


@pytest.fixture
def quantized(jaxquant, model, tmp_path) -> pathlib.Path:
    assert jaxquant("quantize", model, tmp_path / "q", "--recipe", "w8a16").code == 0
    return tmp_path / "q"
