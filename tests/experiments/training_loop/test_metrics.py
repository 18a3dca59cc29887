import io

import numpy as np
import rich.console
from training_loop import Metrics, plot_runs, read_metrics
from training_loop.plots import smoothed
from training_loop.progress import progress, time_text


def test_lines_after_the_checkpoint_and_a_line_that_was_cut_are_dropped(tmp_path):
    file = tmp_path / "m.jsonl"
    metrics = Metrics(file, step=0)
    for step in (1, 2, 3):
        metrics.write(step, loss=step / 3)
    metrics.write(3, loss=None, skipped=True)
    metrics.close()
    with file.open("a") as opened:
        opened.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3, 3]
    again = Metrics(file, step=2)
    assert again.skipped == 0
    again.write(3, loss=1.0)
    again.close()
    assert read_metrics(file) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]


def test_progress_says_how_long_it_will_take():
    now = iter(range(0, 1000, 10))
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200)
    with progress("run", 10, 20, console=console, clock=lambda: next(now)) as told:
        for step in (11, 12, 20):
            told(step, f"loss {step}")
    lines = out.getvalue().splitlines()
    # Began at 0 s; a step was done at 10 s, and nine are left.
    assert lines[0] == "run: step 11/20, loss 11, ETA 1:30"
    assert lines[-1].startswith("run: step 20/20, loss 20, ETA 0:00")


def test_times():
    assert [time_text(x) for x in (3, 61, 3723)] == ["0:03", "1:01", "1:02:03"]


def test_curves_are_means_that_end_at_each_step(tmp_path):
    np.testing.assert_allclose(smoothed([1, 2, 3, 4], share=0.5), [1, 1.5, 2.5, 3.5])
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 2, "score": 1.0}]
    plot_runs({"a": rows}, tmp_path / "a.png", score="score", title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
