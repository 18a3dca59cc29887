"""AdamW with schedules of learning rate and of weight decay, from settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .settings import Optimizer

Schedule = Callable[[Any], Any]

# BitNet b1.58's schedule, in parts of the peak: where stage one ends and where stage two begins.
# Readers' notes of the technical report on the 2B model give 1.5e-3 to 8e-4, then 5e-4 to 0; others
# of the training tips (Microsoft 2024) have one drop to 2/3. The originals were not at hand.
END_OF_ONE, START_OF_TWO = 8 / 15, 5 / 15


def learning_rate(settings: Optimizer, steps: int) -> Schedule:
    """The learning rate of each step."""
    peak = settings.learning_rate
    match settings.schedule:
        case "constant":
            rest: Schedule = optax.constant_schedule(peak)
        case "two_stage":
            rest = two_stage(peak, settings.warmup, steps)
        case _:
            rest = optax.cosine_decay_schedule(peak, steps - settings.warmup, settings.final)
    if settings.warmup == 0:
        return rest
    # Not from 0, which would waste a step.
    up = optax.linear_schedule(peak / settings.warmup, peak, settings.warmup)
    return optax.join_schedules([up, rest], [settings.warmup])


def two_stage(peak: float, warmup: int, steps: int) -> Schedule:
    """From `peak` to 8/15 of it at half of all steps, then from 5/15 of it to 0: two lines.

    Ternary codes of large weights change at a high rate only; the drop lets them settle.
    """
    half = steps // 2 - warmup
    return optax.join_schedules(
        [
            optax.linear_schedule(peak, END_OF_ONE * peak, half),
            optax.linear_schedule(START_OF_TWO * peak, 0.0, steps - warmup - half),
        ],
        [half],
    )


def weight_decay(settings: Optimizer, decay: float, steps: int) -> float | Schedule:
    """With `two_stage` there is none in the second half: latent weights near a threshold, drawn to
    0, would change their codes to the end."""
    if settings.schedule != "two_stage":
        return decay
    return lambda step: jnp.where(step < steps // 2, decay, 0.0)


def make_optimizer(
    settings: Optimizer, steps: int, labels: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """The transformation of gradients to updates, clipped by their norm over all groups.

    `labels` gives a tree of labels for a tree of variables; a label without a group in the settings
    is trained as all others.
    """
    rate = learning_rate(settings, steps)

    def adamw(factor: float, decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: factor * rate(step),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.epsilon,
            weight_decay=weight_decay(settings, decay, steps),
            mask=lambda variables: jax.tree.map(lambda x: x.ndim > 1, variables),
        )

    own = adamw(1.0, settings.weight_decay)
    if labels is not None:
        known = {name: adamw(g.rate, g.weight_decay) for name, g in settings.groups.items()}

        def named(variables: Any) -> Any:
            return jax.tree.map(lambda name: name if name in known else "", labels(variables))

        own = optax.multi_transform({"": own, **known}, named)
    elif settings.groups:
        raise ValueError(
            f"The settings have groups {', '.join(settings.groups)}, and this problem has no "
            "labels. Remove optimizer.groups."
        )
    return (
        own if settings.clip is None else optax.chain(optax.clip_by_global_norm(settings.clip), own)
    )
