"""What no file may do. A file that must break a rule says why in `EXCEPTIONS`."""

import ast
import collections.abc
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LONGEST = 400

# (rule, file) -> reason. Rules are the names of the functions below `@rule`.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("no_reminders", "tests/house/test_files.py"): "it spells the words it looks for",
    ("no_catching_of_everything", "jaxquant/checkpoint/_tokenizer.py"): (
        "tokenizers raises Exception itself for bad text; any subclass is raised on"
    ),
}

# The folders that hold our files: a virtual environment beside them is not ours.
FOLDERS = ("jaxquant", "tests", "experiments", "configs", "docs", ".ci")
SUFFIXES = ("", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".yaml", ".yml")

Rule = collections.abc.Callable[[str, str], collections.abc.Iterable[str]]
RULES: list[Rule] = []


def _files() -> list[pathlib.Path]:
    nested = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(
        path
        for path in [*ROOT.iterdir(), *nested]
        if path.is_file()
        and path.suffix in SUFFIXES
        and path.name not in ("LICENSE", ".git")
        and "__pycache__" not in path.parts
    )


FILES = {path.relative_to(ROOT).as_posix(): path for path in _files()}


def rule(check: Rule) -> Rule:
    """A rule takes a file's name and text, and yields what is wrong with it."""
    RULES.append(check)
    return check


def _nodes(name: str, text: str) -> collections.abc.Iterator[ast.AST]:
    if name.endswith(".py"):
        yield from ast.walk(ast.parse(text, filename=name))


def _imports(name: str, text: str) -> collections.abc.Iterator[tuple[int, str]]:
    """Line and dotted name of everything that the file imports or reaches by attributes."""
    for node in _nodes(name, text):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@rule
def no_long_files(name: str, text: str) -> collections.abc.Iterator[str]:
    lines = text.count("\n")
    if name.endswith(".py") and lines > LONGEST:
        yield f"{lines} lines, more than {LONGEST}: split it"


@rule
def no_private_jax(name: str, text: str) -> collections.abc.Iterator[str]:
    for line, module in _imports(name, text):
        if _within(module, "jax._src"):
            yield f"line {line} reaches into {module}: use the public interface (jax.extend too)"


@rule
def no_pallas_outside_its_file(name: str, text: str) -> collections.abc.Iterator[str]:
    if name == "jaxquant/ops/_pallas.py":
        return
    for line, module in _imports(name, text):
        if _within(module, "jax.experimental.pallas"):
            yield f"line {line} imports Pallas: take it from jaxquant/ops/_pallas.py"


@rule
def no_pickle(name: str, text: str) -> collections.abc.Iterator[str]:
    for line, module in _imports(name, text):
        if module.partition(".")[0] in ("pickle", "cPickle", "cloudpickle", "dill", "shelve"):
            yield f"line {line} uses {module}: a file that is read must never run code"
    for node in _nodes(name, text):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"line {node.value.lineno} allows pickles"


@rule
def no_catching_of_everything(name: str, text: str) -> collections.abc.Iterator[str]:
    for node in _nodes(name, text):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for each in caught:
                if each is None or ast.unparse(each) in ("Exception", "BaseException"):
                    yield f"line {node.lineno} catches everything: name what is expected to fail"


@rule
def no_reminders(name: str, text: str) -> collections.abc.Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
            yield f"line {number} says {found[0]}: do it, or open an issue"


@rule
def no_drawer_for_the_rest(name: str, text: str) -> collections.abc.Iterator[str]:
    for part in pathlib.PurePath(name).parts:
        if re.fullmatch(r"_?(utils?|helpers?|common|misc)(\.py)?", part):
            yield f"{part} says nothing about what is in it: name it by what it does"


@rule
def no_paths_of_one_machine(name: str, text: str) -> collections.abc.Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.search(r"(?<![\w.)}\]/-])/(?:root|home|work|Users|tmp|opt|mnt)/\w*", line):
            yield f"line {number} names {found[0]}: take the path as an argument"


@rule
def no_import_of_the_front_door(name: str, text: str) -> collections.abc.Iterator[str]:
    """`jaxquant/__init__.py` imports every room, so a room that imports it makes a cycle."""
    if not name.startswith("jaxquant/") or name.startswith("jaxquant/cli/"):
        return
    for node in _nodes(name, text):
        if isinstance(node, ast.Import):
            if any(alias.name == "jaxquant" for alias in node.names):
                yield f"line {node.lineno} imports jaxquant itself: import the room that has it"


def _complaints(check: Rule) -> dict[str, list[str]]:
    found = {
        name: list(check(name, path.read_text(encoding="utf-8"))) for name, path in FILES.items()
    }
    return {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_every_file_keeps_the_rule(check: Rule):
    broken = [
        f"{name}: {line}"
        for name, lines in _complaints(check).items()
        if (check.__name__, name) not in EXCEPTIONS
        for line in lines
    ]
    assert not broken, "\n".join(broken)


def test_every_exception_is_still_needed():
    needed = {(check.__name__, name) for check in RULES for name in _complaints(check)}
    assert set(EXCEPTIONS) - needed == set()


VIOLATIONS = {
    "no_long_files": ("a.py", "pass\n" * (LONGEST + 1)),
    "no_private_jax": ("a.py", "from jax._src import core"),
    "no_pallas_outside_its_file": ("a.py", "from jax.experimental import pallas as pl"),
    "no_pickle": ("a.py", "np.load(f, allow_pickle=True)"),
    "no_catching_of_everything": ("a.py", "try: f()\nexcept (KeyError, Exception): pass"),
    "no_reminders": ("a.md", "TODO: write"),
    "no_drawer_for_the_rest": ("jaxquant/utils/a.py", ""),
    "no_paths_of_one_machine": ("a.md", "see " + "/home" + "/me/a.gguf"),
    "no_import_of_the_front_door": ("jaxquant/ops/a.py", "import jaxquant as jq"),
}


@pytest.mark.parametrize("check", RULES, ids=lambda check: check.__name__)
def test_every_rule_finds_its_violation(check: Rule):
    assert list(check(*VIOLATIONS[check.__name__]))
