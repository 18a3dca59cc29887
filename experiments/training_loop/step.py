"""One step: gradients of a batch, in parts, and the update; on a mesh or on one device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .problem import Problem, State, Tree

Metrics = dict[str, jax.Array]


def start(problem: Problem, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step. Arrays are copied: a step takes the state it is given."""
    variables = jax.tree.map(jnp.array, problem.variables)
    return State(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        carried=jax.tree.map(jnp.array, problem.carried),
        optimizer=optimizer.init(variables),
    )


def in_parts(batch: Tree, accumulation: int) -> Tree:
    """Arrays `[batch, ...]` as `[accumulation, batch / accumulation, ...]`."""
    return jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)


def gradients_of(
    problem: Problem, variables: Tree, carried: Tree, parts: Tree, fixed: Tree, key: jax.Array
) -> tuple[jax.Array, Tree, Tree, Tree]:
    """Loss, variables, what is carried, and gradients: means over parts, summed in float32.

    The parts are one after the other in memory: a `scan`.
    """
    differentiated = jax.value_and_grad(problem.loss, has_aux=True)
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        batch = jax.tree.map(lambda x: x[0], parts)
        (loss, carried), gradients = differentiated(variables, carried, batch, fixed, key)
        variables, gradients = problem.between(variables, gradients)
        return loss, variables, carried, gradients

    def part(so_far: Any, given: Any) -> tuple[Any, None]:
        total, variables, carried, sums = so_far
        batch, number = given
        own = jax.random.fold_in(key, number)
        (loss, carried), gradients = differentiated(variables, carried, batch, fixed, own)
        variables, gradients = problem.between(variables, gradients)
        sums = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, gradients)
        return (total + loss.astype(jnp.float32), variables, carried, sums), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), variables)
    first = (jnp.zeros((), jnp.float32), variables, carried, zeros)
    (total, variables, carried, sums), _ = jax.lax.scan(part, first, (parts, jnp.arange(count)))
    mean = jax.tree.map(lambda g, x: (g / count).astype(x.dtype), sums, variables)
    return total / count, variables, carried, mean


def make_step(
    problem: Problem, optimizer: optax.GradientTransformation, *, seed: int
) -> Callable[[State, Tree, Tree], tuple[State, Metrics]]:
    """The pure function from a state, the parts of a batch and what is fixed to the next state.

    With it come the metrics. Where the loss or the gradient is not finite, nothing is changed but
    the step's number, and `finite` is false: what was trained is kept.
    """

    def step(state: State, parts: Tree, fixed: Tree) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, variables, carried, gradients = gradients_of(
            problem, state.variables, state.carried, parts, fixed, key
        )
        norm = optax.tree.norm(gradients)
        # optax has powers of floats by integers, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradients, state.optimizer, variables)
        variables = optax.apply_updates(variables, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = State(step=state.step, variables=variables, carried=carried, optimizer=moments)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        new = dataclasses.replace(new, step=state.step + 1)
        return new, {"loss": loss, "norm": norm, "finite": finite}

    return step
