"""What a run says while it goes: a bar with the time left, or now and then a line."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

Told = Callable[[int, str], None]

SECONDS_BETWEEN_LINES = 30.0


def time_text(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Remaining:
    """The time that is left, by the steps done since this process began."""

    def __init__(self, first: int, steps: int, clock: Callable[[], float]):
        self.first, self.steps, self.clock = first, steps, clock
        self.start = clock()

    def __call__(self, step: int) -> str:
        done = step - self.first
        if done < 1:
            return "-"
        return time_text((self.clock() - self.start) / done * (self.steps - step))


@contextlib.contextmanager
def progress(
    name: str,
    first: int,
    steps: int,
    *,
    console: rich.console.Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Told]:
    """Gives a function of the steps done and of what is to be said of them.

    On a terminal there is a bar; elsewhere a line for each half minute, the first and the last one.
    """
    out = console or rich.console.Console(stderr=True)
    remaining = Remaining(first, steps, clock)
    last = -SECONDS_BETWEEN_LINES
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[said]}, ETA {task.fields[left]}"),
        console=out,
        disable=not out.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=steps, completed=first, said="compiling", left="-")

        def told(step: int, said: str) -> None:
            nonlocal last
            left = remaining(step)
            bar.update(task, completed=step, said=said, left=left)
            if not out.is_terminal and (clock() - last >= SECONDS_BETWEEN_LINES or step == steps):
                last = clock()
                out.print(f"{name}: step {step}/{steps}, {said}, ETA {left}", markup=False)

        yield told
