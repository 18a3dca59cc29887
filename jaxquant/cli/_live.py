"""The table of a calibration, as it grows: a line for each site that is done."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.progress

from ..calibrate import CalibratedSite
from ..calibrate._driver import block_of
from ..calibrate._scaling import Scaled
from ..intercept import Root
from ._console import console

Told = Callable[[CalibratedSite | Scaled, int, int], None]

_WIDTHS = (11, 49, 9, 9, 8, 8)
"""Columns of block, site, loss before and after, seconds, time left: 99 with the gaps."""


@contextlib.contextmanager
def live_table(clock: Callable[[], float] = time.perf_counter) -> Iterator[Told]:
    """Gives a function of what was done, at which level and of how many, which writes a line.

    On a terminal there is a bar below the lines, gone when done; elsewhere there are lines alone.
    Losses are relative errors of a site's output on the calibration data, of rounding to nearest
    and of the codes that were chosen; for factors of inputs, those of the objective.
    """
    out = console()
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("levels, ETA {task.fields[left]}"),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    ) as bar:
        task = bar.add_task("calibrating", total=None, left="-")
        phase: type | None = None
        remaining = Remaining(clock())

        def told(row: CalibratedSite | Scaled, level: int, levels: int) -> None:
            nonlocal phase, remaining
            if type(row) is not phase:
                remaining = Remaining(clock()) if phase is not None else remaining
                phase = type(row)
                if level > 1:
                    out.print(f"levels 1 to {level - 1} were done before", markup=False)
                out.print(header(row), markup=False)
            left = time_text(remaining(block(row), level, levels, clock()))
            for line in lines(row, left):
                out.print(line, markup=False)
            bar.update(task, description=block(row), completed=level - 1, total=levels, left=left)

        yield told


class Remaining:
    """How long the levels that are left will take, by those that are done.

    The first block compiles what later blocks run: as soon as there is another, it is left out.
    """

    def __init__(self, now: float):
        self._done: list[tuple[str, float]] = []
        self._level: int | None = None
        self._block = ""
        self._began = self._last = now

    def __call__(self, block: str, level: int, levels: int, now: float) -> float | None:
        """Seconds left, a site of `level` being done now; `None` before a level is whole."""
        if level != self._level:
            if self._level is not None:
                self._done.append((self._block, self._last - self._began))
            self._level, self._block, self._began = level, block, self._last
        self._last = now
        if not self._done:
            return None
        first = self._done[0][0]
        times = [t for own, t in self._done if own != first] or [t for _, t in self._done]
        mean = sum(times) / len(times)
        return mean * (levels - level) + max(mean - (now - self._began), 0.0)


def block(row: CalibratedSite | Scaled) -> str:
    """The block that a row tells of; of factors that of the first site they are multiplied into."""
    if isinstance(row, CalibratedSite):
        return row.block
    return block_of(Root(path=row.sites[0].partition("#")[0]))


def header(row: CalibratedSite | Scaled) -> str:
    """The names of the columns, for rows of this kind."""
    name = "site" if isinstance(row, CalibratedSite) else f"{row.scaling}: factors go from -> to"
    return _line("block", name, "before", "after", "seconds", "ETA")


def lines(row: CalibratedSite | Scaled, left: str) -> list[str]:
    """The line of a row, and one for each of its notes."""
    own = block(row)
    within = own.partition("[")[0] + "/"
    if isinstance(row, CalibratedSite):
        name, before, after = row.site.removeprefix(within), row.nearest_error, row.error
        notes = row.notes
    else:
        name, before, after, notes = row.fold.replace(within, ""), row.plain_loss, row.loss, ()
    first = _line(own, name, _loss(before), _loss(after), f"{row.seconds:.1f}", left)
    return [first, *(f"{'':{_WIDTHS[0]}} note: {note}" for note in notes)]


def time_text(seconds: float | None) -> str:
    """`1:02:03` or `2:03`; `-` where nothing is known yet."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _line(block: str, name: str, *numbers: str) -> str:
    texts = [f"{block:<{_WIDTHS[0]}}", f"{name:<{_WIDTHS[1]}}"]
    texts += [f"{x:>{width}}" for x, width in zip(numbers, _WIDTHS[2:], strict=True)]
    return " ".join(texts)
