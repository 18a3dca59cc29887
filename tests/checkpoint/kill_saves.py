"""Kills saves at many points and looks at what is left; run by test_folder_interrupted.py.

Forks a process for each save, so that JAX is imported once. The child is killed when it is about to
do the k-th thing to a file in the folder, as Python's audit events tell.
"""

import os
import pathlib
import shutil
import signal
import sys

import numpy as np
from quantized_trees import plan_of

from jaxquant.checkpoint import CheckpointError, read_files, read_manifest, save
from jaxquant.checkpoint._integrity import verify
from jaxquant.intercept import stamped
from jaxquant.numerics import INT8
from jaxquant.qarray import CANONICAL, PER_CHANNEL, QArray, Scheme

WATCHED = {"open", "shutil.rmtree"} | {
    f"os.{name}" for name in ("listdir", "mkdir", "remove", "rename", "rmdir", "scandir")
}


def tree():
    """A small tree without JAX arrays: a process that has made some cannot be forked safely."""
    q = QArray(
        codes=np.ones((4, 6), np.int8),
        scale=np.ones((1, 6), np.float32),
        zero_point=None,
        scheme=Scheme(values=INT8, tile=PER_CHANNEL),
        layout=CANONICAL,
        dtype=np.dtype(np.float32),
    )
    plan = plan_of({"w": q})
    return stamped({"params": {"w": q, "b": np.ones(3, np.float32)}}, plan.fingerprint), plan


def save_in_child(folder: str, number: int, kill_at: int | None, log: str | None = None) -> int:
    """The status of a process that saves, and is killed before event `kill_at`."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    events: list[str] = []

    def watch(event, args):
        if event not in WATCHED or not args or isinstance(args[0], int):
            return
        path = os.fsdecode(args[0])
        if folder in path:
            if len(events) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            events.append(f"{event} {path.removeprefix(folder)}")

    sys.addaudithook(watch)
    save(folder, *tree(), metadata={"number": number}, extra_files={"t": b"%d" % number})
    if log is not None:
        pathlib.Path(log).write_text("\n".join(events))
    os._exit(0)


def number_in(folder: str) -> int:
    """Which save the folder holds, every file checked; 0 for none."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        assert "holds no manifest.json" in str(error), error
        return 0
    number = manifest.metadata["number"]
    data = pathlib.Path(folder, manifest.data)
    verify(data, manifest.files, ["arrays", "files"], lambda name: "")
    assert read_files(folder) == {"t": b"%d" % number}
    return number


def main(folder: str) -> None:
    old, log = f"{folder}.old", f"{folder}.log"

    def reset(existing: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if existing:
            shutil.copytree(old, folder)

    assert save_in_child(folder, 1, None) == 0 and number_in(folder) == 1
    shutil.copytree(folder, old)
    for existing in (0, 1):
        reset(existing)
        assert save_in_child(folder, 2, None, log) == 0 and number_in(folder) == 2
        events = pathlib.Path(log).read_text().splitlines()
        (commit,) = (
            i for i, event in enumerate(events) if event.startswith("os.rename /manifest.json.")
        )
        points = {*range(0, commit, max(1, commit // 5)), *range(commit - 3, len(events))}
        for k in sorted(points):
            reset(existing)
            status = save_in_child(folder, 2, k)
            where = (k, events[k], status)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, where
            assert number_in(folder) == (existing if k <= commit else 2), where
        print(f"{len(points)} of {len(events)} points, the commit is {commit}")
    # After all that, a save that is left alone cleans up.
    assert save_in_child(folder, 3, None) == 0 and number_in(folder) == 3
    assert len(os.listdir(folder)) == 2, os.listdir(folder)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
