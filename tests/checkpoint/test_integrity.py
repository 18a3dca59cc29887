"""Digests: every file of a folder has one, and every difference is reported by name."""

import hashlib
import re

import pytest

from jaxquant.checkpoint import _integrity, CheckpointError

CONTENTS = {"a/x": b"12345", "a/b/y": b"", "z": bytes(3 << 20)}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_every_file_has_its_size_and_digest(folder):
    found = {file.name: (file.bytes, file.sha256) for file in _integrity.digests(folder)}
    assert found == {
        name: (len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENTS.items()
    }


def check(folder, files):
    _integrity.verify(folder, files, ["a"], lambda name: f" (part of {name[0]})")


def test_a_folder_that_nobody_touched_passes(folder):
    check(folder, _integrity.digests(folder))


DAMAGE = {
    "flipped": (lambda f: (f / "a/x").write_bytes(b"1234\x34"), "a/x does not match its checksum"),
    "cut": (lambda f: (f / "z").write_bytes(b"0"), "z has 1 bytes, not 3145728 (part of z)"),
    "grown": (lambda f: (f / "a/b/y").write_bytes(b"0"), "a/b/y has 1 bytes, not 0"),
    "missing": (lambda f: (f / "a/x").unlink(), "a/x is missing (part of a)"),
    "a folder": (lambda f: ((f / "a/x").unlink(), (f / "a/x").mkdir()), "a/x cannot be read"),
    "foreign": (lambda f: (f / "a/new").touch(), "a/new is not a file of this checkpoint"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_reported_by_name(case, folder):
    damage, words = DAMAGE[case]
    files = _integrity.digests(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        check(folder, files)


def test_much_damage_is_one_line(folder):
    for i in range(9):
        (folder / f"a/{i}").touch()
    files = _integrity.digests(folder)
    for i in range(9):
        (folder / f"a/{i}").unlink()
    with pytest.raises(CheckpointError, match="a/0 is missing.*a/4 is missing.*; and 4 more"):
        check(folder, files)
