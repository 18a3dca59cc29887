"""The loop: from settings and a problem to a trained state, through kills and restarts."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .checkpoints import Checkpoints
from .mesh import make_mesh, of_parts, placed
from .metrics import Metrics
from .optimizer import learning_rate, make_optimizer
from .problem import Problem, State, TrainingError
from .progress import progress
from .settings import as_data, check, Devices, Loop, Optimizer, REPORTING
from .step import in_parts, make_step, start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The state after the last step, its scores, and the seconds of a step (the median)."""

    state: State
    scores: dict[str, float]
    seconds_per_step: float | None


def train(
    problem: Problem,
    loop: Loop,
    optimizer: Optimizer,
    out: Path,
    *,
    devices: Devices | None = None,
    name: str = "training",
    clock: Callable[[], float] = time.perf_counter,
) -> Trained:
    """Trains `problem`, or goes on where `out` says it was stopped.

    `out` gets `metrics.jsonl` and `checkpoints/`. A run that was killed gives, when it is started
    again with the same settings on the same machine, with as many devices and as many cores, the
    same losses to the bit: the state is stored whole, and the data of a step is a function of its
    number. Other devices, or another number of cores (XLA splits sums by them), change losses by
    rounding. The reporting (`log_every`, ...) may be set anew.

    **Raises:** `ValueError` for settings that do not fit; `TrainingError` if a loss or a gradient
    is not finite more often than `loop.skips` permits, if `problem.check` refuses the variables, or
    if a checkpoint in `out` is of other settings. The checkpoints that are there are left.
    """
    devices = devices or Devices()
    check(loop, optimizer, devices)
    mesh = make_mesh(devices)
    transform = make_optimizer(optimizer, loop.steps, problem.labels)
    rate = learning_rate(optimizer, loop.steps)
    # Made on no device: shapes tell where each array will lie.
    places = placed(jax.eval_shape(lambda: start(problem, transform)), mesh)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(
        out / "checkpoints", identity_of(problem, loop, optimizer), keep=loop.keep
    )
    state = jax.device_put(start(problem, transform), places)
    if checkpoints.latest is not None:
        state = checkpoints.restore(state, places)
    step_of = make_step(problem, transform, seed=loop.seed)
    compiled = jax.jit(step_of, donate_argnums=0, out_shardings=(places, None))
    fixed = jax.device_put(problem.fixed, placed(problem.fixed, mesh))
    first = int(state.step)
    metrics = Metrics(out / "metrics.jsonl", step=first)
    run = _Run(problem, loop, checkpoints, metrics, lambda step: float(rate(step)), clock)
    try:
        with progress(name, first, loop.steps, clock=clock) as told:
            for step in range(first + 1, loop.steps + 1):
                batch = in_parts(problem.batch(step - 1), loop.accumulation)
                state, found = compiled(state, jax.device_put(batch, of_parts(mesh)), fixed)
                run.pending.append((step, found))
                for said in run.after(step, state):
                    told(step, said)
        if not run.scores:
            run.scores = problem.evaluate(state.variables, state.carried)
    finally:
        metrics.close()
        checkpoints.close()
    # The first holds the compiling.
    steady = run.seconds[1:] or run.seconds
    return Trained(
        state=state,
        scores=run.scores,
        seconds_per_step=float(np.median(steady)) if steady else None,
    )


def identity_of(problem: Problem, loop: Loop, optimizer: Optimizer) -> dict[str, Any]:
    """What two runs have in common if one may go on from the other's checkpoint."""
    held = {k: v for k, v in as_data(loop).items() if k not in REPORTING}
    return {"problem": dict(problem.identity), "loop": held, "optimizer": as_data(optimizer)}


class _Run:
    """What is done between steps: writing metrics, evaluating, checking, saving."""

    def __init__(
        self,
        problem: Problem,
        loop: Loop,
        checkpoints: Checkpoints,
        metrics: Metrics,
        rate: Callable[[int], float],
        clock: Callable[[], float],
    ):
        self.problem, self.loop, self.checkpoints = problem, loop, checkpoints
        self.metrics, self.rate, self.clock = metrics, rate, clock
        # Steps whose metrics are still on the device: to fetch them is to wait for the step.
        self.pending: list[tuple[int, Any]] = []
        self.seconds: list[float] = []
        self.scores: dict[str, float] = {}
        self.skipped = metrics.skipped
        self.last = clock()

    def after(self, step: int, state: State) -> Iterator[str]:
        """All that is due after a step; gives what is to be said."""
        done = step == self.loop.steps
        evaluates, saves = (
            done or step % every == 0 for every in (self.loop.evaluate_every, self.loop.save_every)
        )
        if evaluates or saves or step % self.loop.log_every == 0:
            yield f"loss {self.flush():.4f}"
        if evaluates:
            self.scores = self.problem.evaluate(state.variables, state.carried)
            self.metrics.write(step, **self.scores)
            yield ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())
        if saves:
            self.check(state)
            self.checkpoints.save(state)
        if evaluates or saves:
            self.last = self.clock()

    def flush(self) -> float:
        """Writes what steps told, before a checkpoint always; the last loss.

        **Raises:** `TrainingError` if too many were not finite.
        """
        loss, count = math.nan, len(self.pending)
        for step, told in self.pending:
            loss, norm, finite = (told[name].item() for name in ("loss", "norm", "finite"))
            skipped = {} if finite else {"skipped": True}
            numbers = {"loss": loss, "norm": norm, "rate": self.rate(step - 1)}
            # JSON has no NaN.
            written = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
            self.metrics.write(step, **written, **skipped)
            self.skipped += not finite
            if self.skipped > self.loop.skips:
                raise TrainingError(
                    f"The loss of step {step} is {loss} and the norm of its gradient {norm}. "
                    f"Lower the learning rate, or look at the batch; {self.checkpoints.where()}."
                )
        self.pending.clear()
        now = self.clock()
        if count:
            self.seconds.append((now - self.last) / count)
        self.last = now
        return loss

    def check(self, state: State) -> None:
        """**Raises:** `TrainingError` if the problem refuses the variables."""
        try:
            self.problem.check(state.variables)
        except ValueError as error:
            raise TrainingError(f"{error} For this run, {self.checkpoints.where()}.") from None
