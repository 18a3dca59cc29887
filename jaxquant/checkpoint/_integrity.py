"""Digests of the files of a checkpoint, and what is wrong with those that no longer match."""

import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ._errors import CheckpointError
from ._manifest import File

_BLOCK = 1 << 20
_MOST_NAMED = 5
_THREADS = 16


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, read in blocks."""
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
            size += len(block)
    return size, sha.hexdigest()


def digests(folder: Path) -> list[File]:
    """Every file under `folder`, by name; what is recorded is on the disk when this returns."""

    def one(path: Path) -> File:
        size, sha = digest(path)
        sync(path)
        return File(name=path.relative_to(folder).as_posix(), bytes=size, sha256=sha)

    paths, directories = [], []
    for directory, _, names in os.walk(folder):
        directories.append(Path(directory))
        paths += [Path(directory, name) for name in names]
    # Waiting for the disk is most of it, and a disk finishes many waits together.
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(one, sorted(paths)))
        list(pool.map(sync, directories))
    return found


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(
    folder: Path, files: Iterable[File], inside: Iterable[str], holds: Callable[[str], str]
) -> None:
    """Checks files, and that the directories `inside` the folder hold no others.

    `holds` says what a file is for.

    **Raises:** `CheckpointError` naming every file that is missing, cut short, changed or foreign.
    """
    problems = []
    known = set()
    for file in files:
        known.add(file.name)
        try:
            size, sha = digest(folder / file.name)
        except (FileNotFoundError, NotADirectoryError):
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        else:
            if size != file.bytes:
                problem = f"has {size} bytes, not {file.bytes}"
            elif sha != file.sha256:
                problem = "does not match its checksum"
            else:
                continue
        problems.append(f"{file.name} {problem}{holds(file.name)}")
    for directory in inside:
        for path in sorted((folder / directory).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in known:
                problems.append(f"{name} is not a file of this checkpoint")
    if problems:
        more = len(problems) - _MOST_NAMED
        listed = "; ".join(problems[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"The checkpoint is damaged. In {folder}: {listed}. Restore these files from another "
            "copy, or save the checkpoint again."
        )
