"""Processes side by side, each on cores of its own."""

import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_shares(tasks: Sequence[T], run: Callable[[T, list[int]], bool], jobs: int) -> list[T]:
    """`run(task, cores)` for each task, in order, at most `jobs` at a time; those that failed.

    The cores of this process are dealt out to so many shares, and a task gets the next share that
    is free: to be told to a process that it starts and waits for.

    **Raises:** `ValueError` for less than one job.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}; at least one task runs at a time.")
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs, len(cores))
    shares: queue.Queue[list[int]] = queue.Queue()
    for first in range(jobs):
        shares.put(cores[first::jobs])

    def one(task: T) -> bool:
        share = shares.get()
        try:
            return run(task, share)
        finally:
            shares.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(one, tasks))
    return [task for task, well in zip(tasks, done, strict=True) if not well]
