"""A small problem that the loop's tests train: a curve fitted by a layer of tanh.

    python tests/experiments/training_loop/toy_training.py FOLDER

trains it in a process that may be killed.
"""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from training_loop import Loop, Optimizer, Order, Problem, train

POINTS = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
OPTIMIZER = Optimizer(learning_rate=3e-3, warmup=5)
LOOP = Loop(steps=40, batch=16, log_every=4, save_every=8, evaluate_every=20)


def loss(variables: Any, carried: Any, batch: Any, fixed: Any, key: Any) -> Any:
    """Squared errors, with noise on the points; `carried` counts the points that were seen."""
    x = batch + 0.01 * jax.random.normal(key, batch.shape)
    found = jnp.tanh(x @ variables["in"]) @ variables["out"]
    wanted = jnp.sin(batch.sum(axis=-1, keepdims=True))
    return jnp.mean((found - wanted) ** 2), carried + batch.shape[0]


def toy(**changes: Any) -> Problem:
    rng = np.random.default_rng(1)
    variables = {
        "in": jnp.asarray(rng.normal(size=(16, 256)) / 4, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(256, 1)) / 16, jnp.float32),
    }
    order = Order(count=len(POINTS), batch=LOOP.batch, seed=3)

    def evaluate(variables: Any, carried: Any) -> dict[str, float]:
        points = jnp.asarray(POINTS)
        return {"score": float(loss(variables, carried, points, (), jax.random.key(0))[0])}

    usual: dict[str, Any] = {
        "loss": loss,
        "variables": variables,
        "carried": jnp.zeros((), jnp.int32),
        "batch": lambda step: POINTS[order.at(step)[1]],
        "evaluate": evaluate,
        "identity": {"points": len(POINTS)},
    }
    return Problem(**(usual | changes))


def main() -> None:
    problem = toy()

    def slow(step: int) -> Any:
        time.sleep(0.03)
        return problem.batch(step)

    print("ready", flush=True)
    train(toy(batch=slow), LOOP, OPTIMIZER, pathlib.Path(sys.argv[1]))
    print("done", flush=True)


if __name__ == "__main__":
    main()
