"""Tasks side by side: every one runs, on cores that nobody else has meanwhile."""

import os
import threading

import pytest
from training_loop import in_shares


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_every_task_runs_once_on_cores_of_its_own(jobs):
    lock, taken, seen, most = threading.Lock(), set(), [], [0]

    def run(task, cores):
        with lock:
            assert cores and not taken & set(cores)
            taken.update(cores)
            most[0] = max(most[0], len(taken))
            seen.append(task)
        threading.Event().wait(0.01)
        with lock:
            taken.difference_update(cores)
        return task % 3 != 0

    assert in_shares(range(7), run, jobs) == [0, 3, 6]
    assert sorted(seen) == list(range(7))
    assert most[0] <= len(os.sched_getaffinity(0))


def test_what_a_task_raises_is_raised():
    def run(task, cores):
        raise RuntimeError(f"task {task}")

    with pytest.raises(RuntimeError, match="task 1"):
        in_shares([1], run, 2)


def test_less_than_one_job_is_refused():
    with pytest.raises(ValueError, match="jobs=0"):
        in_shares([1], lambda task, cores: True, 0)
