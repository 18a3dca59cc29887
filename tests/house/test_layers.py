"""The contracts of pyproject.toml: imports point one way, and every room is listed."""

import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[2]


def _layers() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (each for each in contracts["contracts"] if each["id"] == "layers")
    assert contract["exhaustive"], "without `exhaustive`, a new folder would go unchecked"
    return contract["layers"]


def test_the_rooms_stand_in_this_order():
    assert [room.strip("()") for room in reversed(_layers())] == [
        "numerics",
        "qarray",
        "ops",
        "training",
        "intercept",
        "algorithms",
        "recipes",
        "checkpoint",
        "models",
        "calibrate",
        "evaluate",
        "aot",
        "cli",
        "__main__",
    ]


def test_a_room_that_exists_is_not_optional():
    optional = [room.strip("()") for room in _layers() if room.startswith("(")]
    built = [room for room in optional if (ROOT / "jaxquant" / room / "__init__.py").exists()]
    assert not built, f"remove the parentheses around {built} in pyproject.toml"


def test_imports_point_one_way():
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
