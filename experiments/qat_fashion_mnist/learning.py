"""One training loop for float models and for simulated ones."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data import batches
from fashion_mnist import Data
from flax import linen as nn
from settings import Schedule

import jaxquant as jq

REPORTED = 50  # Steps whose mean loss is one number.
Apply = Callable[..., Any]


class Diverged(FloatingPointError):
    """The loss is NaN; the message says of what run, and where."""


def optimizer_of(schedule: Schedule, steps: int, learned_rate: float) -> Any:
    """AdamW for weights; for learned scales Adam, each step in parts of the scale itself.

    Scales of 8 bits are a hundredth of those of 2 bits, so that no one step fits both, and what is
    multiplied stays positive.
    """

    def rate(peak: float) -> Any:
        warmup = min(schedule.warmup, steps // 4)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)

    weights = optax.adamw(rate(schedule.rate), weight_decay=schedule.decay, mask=_matrices)
    learned = optax.chain(
        optax.scale_by_adam(), _relative(), optax.scale_by_learning_rate(rate(learned_rate))
    )
    return optax.multi_transform({"weights": weights, "learned": learned}, jq.training_labels)


def _relative() -> Any:
    """Updates times the size of what they change."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p: u * jnp.abs(p), updates, params)
    )


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def trained(
    apply: Apply,
    variables: Any,
    data: Data,
    schedule: Schedule,
    *,
    batch: int,
    learned_rate: float,
    seed: int,
    say: Callable[[str], None] = print,
) -> tuple[Any, dict[str, Any]]:
    """The variables after `schedule`, and what there is to tell: losses, steps, seconds.

    `apply(variables, images, train=True, mutable=...)` gives logits, and running statistics.

    **Raises:** `Diverged`.
    """
    steps = max(1, round(schedule.epochs * (len(data.labels) // batch)))
    optimizer = optimizer_of(schedule, steps, learned_rate)
    moving, state_of = apart(variables)

    def loss_of(moving: Any, still: Any, images: Any, labels: Any) -> Any:
        logits, written = apply(
            together(moving, still), images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, {**still, **written}

    @jax.jit
    def step(moving: Any, still: Any, state: Any, images: Any, labels: Any) -> Any:
        (loss, still), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            moving, still, images, labels
        )
        updates, state = optimizer.update(gradients, state, moving)
        return optax.apply_updates(moving, updates), still, state, loss

    still, state = state_of, optimizer.init(moving)
    losses: list[float] = []
    recent: list[Any] = []
    start = last = time.perf_counter()
    first = math.nan
    for number, (images, labels) in enumerate(batches(data, batch, steps, seed), 1):
        moving, still, state, loss = step(moving, still, state, images, labels)
        recent.append(loss)
        if number == 1:
            jax.block_until_ready(loss)
            first = time.perf_counter() - start
        if number % REPORTED == 0 or number == steps:
            losses.append(float(np.mean([float(x) for x in recent])))
            recent = []
            if not math.isfinite(losses[-1]):
                raise Diverged(
                    f"The loss is {losses[-1]} by step {number} of {steps}. Lower the rates in "
                    f"settings.py: {schedule}, learned_rate={learned_rate}."
                )
            now = time.perf_counter()
            if now - last > 20 or number == steps:
                last, done = now, (now - start - first) / max(1, number - 1)
                left = done * (steps - number)
                say(f"step {number} of {steps}, loss {losses[-1]:.4f}, {left:.0f} s left")
    seconds = time.perf_counter() - start
    told = {
        "steps": steps,
        "losses": losses,
        "seconds": seconds,
        "compile_seconds": first,
        "step_seconds": (seconds - first) / max(1, steps - 1),
    }
    return together(moving, still), told


def apart(variables: Any) -> tuple[Any, Any]:
    """What is trained (`params`, and what is learned beside them), and running statistics."""
    moving = {name: part for name, part in variables.items() if name != "batch_stats"}
    return moving, {name: part for name, part in variables.items() if name == "batch_stats"}


def together(moving: Any, still: Any) -> Any:
    return {**moving, **still}


def initial(model: nn.Module, seed: int) -> Any:
    """Fresh variables."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 28, 28, 1)))
