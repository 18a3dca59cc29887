"""What commands write: lines and tables on stdout, a bar on stderr, JSON into files."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table

WIDTH = 100
"""Columns of tables, also where the output is no terminal."""


def console() -> rich.console.Console:
    """Stdout, as it is now (tests and notebooks replace it)."""
    found = rich.console.Console(highlight=False, soft_wrap=True)
    return (
        found
        if found.is_terminal
        else rich.console.Console(highlight=False, soft_wrap=True, width=WIDTH)
    )


def say(text: str) -> None:
    """A line of plain text, as it stands."""
    console().print(text, markup=False)


def table(*columns: str, title: str | None = None) -> rich.table.Table:
    """An empty table; the first column reads left, the others, being numbers, right."""
    made = rich.table.Table(
        title=title,
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
    )
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    return made


def show(shown: rich.table.Table) -> None:
    """Prints a table within `WIDTH` columns."""
    out = console()
    out.print(shown, width=min(out.width, WIDTH), soft_wrap=False)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal, gone when done; elsewhere nothing.

    Gives a function of how much is done and of how much.
    """
    screen = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def check_json(path: pathlib.Path | None) -> None:
    """Says now what would stop `write_json` after the work is done.

    **Raises:** `ValueError` if there is no folder for the file, or a folder in its place.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}. Make it first.")


def write_json(path: pathlib.Path | None, value: dict[str, Any]) -> None:
    """Writes `value` to the file at `path`, whole or not at all; nothing for `None`."""
    if path is None:
        return
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
