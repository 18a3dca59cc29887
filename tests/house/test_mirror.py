"""Tests mirror the source: `jaxquant/ops/dot/_xla.py` is tested in `tests/ops/dot/test_xla.py`.

A long test file may be split: `test_xla_grouped.py` also belongs to `_xla.py`.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "jaxquant"
TESTS = ROOT / "tests"

# Folders of `tests/` that mirror no room.
BESIDE = {
    "experiments": "packages that experiments share, in the mirror of experiments/",
    "golden": "files and bytes of other libraries",
    "house": "what must hold for the whole repository",
    "laws": "what must hold for tables of formats, schemes, operations and transformations",
    "toys": "small models that several tests share",
}

# Source file -> where it is tested, or why it is not.
NOT_MIRRORED: dict[str, str] = {}


def _has_logic(path: pathlib.Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree))


def _sources() -> list[str]:
    """Files that should have a test, as `ops/dot/_xla.py`."""
    return sorted(
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py" and _has_logic(path)
    )


def _tests() -> list[str]:
    names = (path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py"))
    return sorted(name for name in names if name.partition("/")[0] not in BESIDE)


def _sources_of(test: str) -> list[str]:
    """The files that a test may belong to by its name, the closest first."""
    folder, words = pathlib.PurePosixPath(test).parent, pathlib.PurePath(test).stem.split("_")[1:]
    stems = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return [(folder / name).as_posix() for stem in stems for name in (f"_{stem}.py", f"{stem}.py")]


def _source_of(test: str) -> str | None:
    return next((name for name in _sources_of(test) if (SOURCE / name).is_file()), None)


def test_every_test_file_mirrors_a_source_file():
    lost = [f"tests/{test}" for test in _tests() if _source_of(test) is None]
    assert not lost, f"{lost} mirror no file of jaxquant/, nor are they in one of {[*BESIDE]}"


def test_every_source_file_with_logic_is_tested():
    tested = {_source_of(test) for test in _tests()}
    untested = [name for name in _sources() if name not in tested and name not in NOT_MIRRORED]
    assert not untested, "\n".join(
        f"jaxquant/{name} has no tests/{pathlib.PurePath(name).parent.as_posix()}"
        f"/test_{pathlib.PurePath(name).stem.lstrip('_')}.py: add it, or say why in NOT_MIRRORED"
        for name in untested
    )


def test_every_exception_is_still_needed():
    tested = {_source_of(test) for test in _tests()}
    assert [name for name in NOT_MIRRORED if name in tested or name not in _sources()] == []


def test_a_test_belongs_to_the_closest_name():
    assert _sources_of("ops/test_dot_xla.py") == [
        "ops/_dot_xla.py",
        "ops/dot_xla.py",
        "ops/_dot.py",
        "ops/dot.py",
    ]
