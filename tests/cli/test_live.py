"""The table of a calibration: a line for each site, the time that is left, and a bar to look at."""

import io

import pytest
import rich.console

import jaxquant.cli._live as live
from jaxquant.calibrate import CalibratedSite
from jaxquant.calibrate._scaling import Scaled
from jaxquant.cli._live import block, lines, live_table, Remaining, time_text


def site(name="layers/0/attention/q/kernel", block="layers/0", **changed):
    usual = {"nearest_error": 0.0123456, "error": 4.5e-7, "rows": 9, "seconds": 1.26, "notes": ()}
    return CalibratedSite(
        site=f"{name}#dot", root=name, block=block, algorithm="gptq", **{**usual, **changed}
    )


SCALED = Scaled(
    scaling="awq",
    fold="layers/12/norm/scale -> layers/12/attention/{q,k}/kernel",
    sites=("layers/12/attention/q/kernel#dot", "layers/12/attention/k/kernel#dot"),
    plain_loss=40.4152,
    loss=40.2,
    seconds=0.54,
)


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_the_block_the_site_losses_and_times():
    (line,) = lines(site(), "1:02")
    assert line.split() == [
        "layers/0",
        "attention/q/kernel#dot",
        "0.0123",
        "4.5e-07",
        "1.3",
        "1:02",
    ]
    (line,) = lines(site(nearest_error=None, error=None), "-")
    assert line.split()[2:4] == ["-", "-"]
    # A slice of a scanned parameter: the path has no number, the block does.
    (line,) = lines(site("layers/q/kernel", "layers[3]"), "-")
    assert line.split()[:2] == ["layers[3]", "q/kernel#dot"]
    assert len(line) < 100


def test_what_did_not_go_as_usual_is_said_below():
    assert lines(site(notes=("rank 3 of 8", "damped")), "-")[1:] == [
        "            note: rank 3 of 8",
        "            note: damped",
    ]


def test_factors_tell_where_they_come_from_and_go_to():
    (line,) = lines(SCALED, "-")
    assert block(SCALED) == "layers/12"
    names = ["layers/12", "norm/scale", "->", "attention/{q,k}/kernel"]
    assert line.split() == [*names, "40.4", "40.2", "0.5", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")],
)
def test_times_read_as_clocks_do(seconds, text):
    assert time_text(seconds) == text


def test_what_is_left_is_told_by_the_levels_that_are_done():
    remaining = Remaining(100.0)
    # The first level takes 20 seconds, the second one 10: both of the first block.
    assert remaining("a", 1, 6, 115.0) is None
    assert remaining("a", 1, 6, 120.0) is None
    # Four more levels like the first, and of this one 10 seconds.
    assert remaining("a", 2, 6, 130.0) == pytest.approx(4 * 20 + 10)
    # The mean is 15; level 3 has taken 2 seconds of it.
    assert remaining("b", 3, 6, 132.0) == pytest.approx(3 * 15 + 13)
    # Level 3 took 4 seconds: it alone is no part of the block that compiled everything.
    assert remaining("b", 3, 6, 134.0) == pytest.approx(3 * 15 + 11)
    assert remaining("b", 4, 6, 135.0) == pytest.approx(2 * 4 + 3)
    # A level that takes longer than the mean leaves what the others take.
    assert remaining("b", 4, 6, 150.0) == pytest.approx(2 * 4)


def test_where_there_is_no_terminal_there_are_plain_lines(capsys):
    clock = Clock()
    with live_table(clock) as told:
        for level, seconds in ((1, 10.0), (2, 20.0)):
            clock.now = seconds
            told(SCALED, level, 2)
        for level, seconds in ((1, 24.0), (2, 28.0)):
            clock.now = seconds
            told(site(), level, 2)
    out = capsys.readouterr()
    assert out.err == "" and "\x1b" not in out.out
    rows = [line.split() for line in out.out.splitlines()]
    assert [row[-1] for row in rows] == ["ETA", "-", "0:00", "ETA", "-", "0:00"]
    assert rows[0][1] == "awq:" and rows[3] == ["block", "site", *rows[3][2:]]
    assert rows[3][2:] == ["before", "after", "seconds", "ETA"]


def test_levels_that_were_done_before_are_told(capsys):
    with live_table(Clock()) as told:
        told(site(), 3, 8)
    assert capsys.readouterr().out.splitlines()[0] == "levels 1 to 2 were done before"


def test_on_a_terminal_a_bar_stands_below_and_goes(monkeypatch):
    shown = io.StringIO()
    terminal = rich.console.Console(file=shown, force_terminal=True, soft_wrap=True, width=120)
    monkeypatch.setattr(live, "console", lambda: terminal)
    with live_table(Clock()) as told:
        told(site(), 3, 8)
    assert "2/8" in shown.getvalue() and "levels, ETA -" in shown.getvalue()
    assert "attention/q/kernel#dot" in shown.getvalue()
