"""The front door computes nothing, is documented, and is the one that the tour shows."""

import ast
import inspect
import pathlib
import re

import pytest

import jaxquant

ROOT = pathlib.Path(__file__).parents[2]
DOOR = ast.parse((ROOT / "jaxquant" / "__init__.py").read_text(encoding="utf-8"))
TOUR = ROOT / "docs" / "tour.md"
MOST = 60

NAMES = sorted(
    alias.asname
    for node in ast.walk(DOOR)
    if isinstance(node, ast.Import | ast.ImportFrom)
    for alias in node.names
    if alias.asname and not alias.asname.startswith("_")
)


def _names_in_the_tour() -> list[str]:
    """Names in the first column of the table under the heading that says "front door"."""
    sections = re.split(r"^#+ (.*)$", TOUR.read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = [
        body
        for title, body in zip(sections[1::2], sections[2::2], strict=True)
        if "front door" in title.lower()
    ]
    assert len(tables) == 1, f"{TOUR.name} needs one heading with the words 'front door'"
    cells = re.findall(r"^\|([^|]*)\|", tables[0], flags=re.MULTILINE)
    return sorted(name for cell in cells for name in re.findall(r"`(?:jq\.)?(\w+)[^`]*`", cell))


def test_the_front_door_only_imports_and_renames_nothing():
    docstring, *rest = DOOR.body
    assert isinstance(docstring, ast.Expr) and ast.get_docstring(DOOR)
    for node in rest:
        assert isinstance(node, ast.ImportFrom), f"it computes: {ast.unparse(node)}"
        for alias in node.names:
            assert alias.name == alias.asname, f"write `{alias.name} as {alias.name}`"


def test_the_front_door_stays_small():
    assert 0 < len(NAMES) <= MOST


def test_the_tour_lists_every_name_of_the_front_door_and_no_other():
    assert _names_in_the_tour() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring(name: str):
    thing = getattr(jaxquant, name)
    # A constant is documented by its type. Docstrings of base classes do not count.
    owner = thing if inspect.ismodule(thing) or callable(thing) else type(thing)
    docstring = (vars(owner) if inspect.isclass(owner) else {"__doc__": owner.__doc__})["__doc__"]
    assert docstring, f"jaxquant.{name} has no docstring"
    # `dataclass` writes the signature into classes that have none.
    assert not docstring.startswith(f"{getattr(owner, '__name__', '')}("), f"jaxquant.{name} too"
