"""The way in: what is wrong is said in one line, and a bug is not dressed up as an error."""

import subprocess
import sys

import pytest

import jaxquant.cli._main as cli
from jaxquant.intercept import PlanError
from jaxquant.ops import Refusal


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("halve", "model"),
        ("quantize", "model"),
        ("quantize", "model", "out"),
        ("quantize", "model", "out", "--recipe", "w8a16", "--fast"),
        ("evaluate", "model"),
        ("evaluate", "model", "--tokens", "a.npz", "--text", "a.txt"),
        ("evaluate", "model", "--text", "a.txt", "--length", "0"),
        ("evaluate", "model", "--text", "a.txt", "--batch", "two"),
        ("bench", "sprint"),
        ("compile", "model"),
        ("compile", "model", "--target", "v5e", "--prefill", "4y4"),
    ],
)
def test_what_cannot_be_typed_is_said_in_one_line(jaxquant, arguments):
    ran = jaxquant(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.count("\n") == 1 and "--help" in ran.err


@pytest.mark.parametrize("command", ["quantize", "evaluate", "inspect", "bench", "compile", "demo"])
def test_every_command_explains_itself(jaxquant, command):
    ran = jaxquant(command, "--help")
    assert ran.code == 0 and command in ran.out and ran.err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a is 3. Give 4."), "a is 3. Give 4."),
        (PlanError("no fit:\n  - first\n  - second\nThe end"), "no fit: first; second; The end"),
        (FileNotFoundError(2, "No such file or directory", "a.gguf"), "a.gguf: No such file or "),
        (FileNotFoundError("There is nothing at a."), "There is nothing at a."),
        (Refusal("No backend."), "No backend."),
        (ImportError("pip install 'jaxquant[hub]'"), "pip install 'jaxquant[hub]'"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_expected_error_is_one_line_and_exit_2(jaxquant, monkeypatch, error, line):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "run_inspect", fail)
    ran = jaxquant("inspect", "model")
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith(f"jaxquant: error: {line}") and ran.err.count("\n") == 1


def test_a_bug_is_not_hidden(jaxquant, monkeypatch):
    def fail(arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "run_inspect", fail)
    with pytest.raises(KeyError):
        jaxquant("inspect", "model")


def test_an_interrupt_exits_as_shells_expect(jaxquant, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_inspect", interrupt)
    ran = jaxquant("inspect", "model")
    assert (ran.code, ran.err) == (130, "jaxquant: interrupted\n")


def test_python_m_jaxquant_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "jaxquant", "inspect", str(tmp_path / "none.gguf")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    # The CUDA plugin, if it is installed, says when it is loaded that no driver is here.
    plugin = ("WARNING: All log messages before absl::InitializeLog()", "I0000 ")
    (line,) = (each for each in ran.stderr.splitlines() if not each.startswith(plugin))
    assert line.startswith("jaxquant: error: ")
