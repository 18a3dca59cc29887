"""Models side by side: float32 and as recipes hold it, and what is timed of each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .. import recipes
from ..algorithms import quantize
from ..checkpoint import materialize
from ..intercept import Plan, prepare, Recipe, wrap
from ..models import bind, Inventory, OpenedModel, variables_inventory
from ._quantize import plan_for

FLOAT = "float32"
CONTEXT = 128
"""Tokens that a decoded token looks back on, when timed."""
STEPS = 8
"""Tokens decoded in one timed round."""
NEW_TOKENS = 24
"""Tokens of a completion, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One way to hold and compute a model. `plan` is `None` for float32."""

    name: str
    model: Any
    plan: Plan | None
    recipe: Recipe | None
    inventory: Inventory


def float_side(opened: OpenedModel) -> Side:
    """The model in float32, its numbers in memory.

    **Raises:** `ValueError` if what was opened is quantized.
    """
    if opened.plan is not None:
        raise ValueError(
            f"{opened.path} is quantized already. Give the float model: it is one of the sides."
        )
    variables = materialize(opened.variables)
    return Side(
        name=FLOAT,
        model=bind(opened.model, variables),
        plan=None,
        recipe=None,
        inventory=variables_inventory(variables),
    )


def quantized_side(opened: OpenedModel, plain: Side, recipe: Recipe) -> Side:
    """The model by a recipe, from the numbers that the float side holds."""
    plan = plan_for(opened, recipe)
    qvariables = quantize(nnx.state(plain.model), plan)
    inventory = variables_inventory(qvariables)
    model = wrap(opened.model, plan, prepare(qvariables, plan))
    return Side(name=recipe.name, model=model, plan=plan, recipe=recipe, inventory=inventory)


USUAL = (recipes.W8A16, recipes.W4A16_G64, recipes.W4A16_G64_E8, recipes.W8A8, recipes.FP8)
"""Without MX and NV formats and NF4, which are for chips and checkpoints that have them."""


def wanted_recipes(names_or_files: Sequence[str] | None) -> list[Recipe]:
    """The recipes asked for; those that a CPU is good at if none was.

    **Raises:** `ValueError` for an unknown one, or two of one name.
    """
    if names_or_files is None:
        return list(USUAL)
    found = [recipes.find(text) for text in names_or_files]
    names = [recipe.name for recipe in found]
    twice = sorted({name for name in names if names.count(name) > 1 or name == FLOAT})
    if twice:
        raise ValueError(f"The recipe name {twice[0]!r} is taken. Each side needs its own name.")
    return found


def with_flat_arguments(function: Callable[..., Any], model: Any, **options: Any) -> Callable:
    """`jit` of `function(model, ...)` with the model's arrays as a flat list.

    A list goes through `jit`'s fast path. A model of 300 Variables takes a millisecond or more to
    take apart in Python, at every call, which is no part of what is to be timed.
    """
    leaves, tree = jax.tree.flatten(model)

    def flat(leaves: list[Any], *args: Any) -> Any:
        return function(jax.tree.unflatten(tree, leaves), *args)

    compiled = jax.jit(flat, **options)
    return lambda *args: compiled(leaves, *args)


def prefill(model: Any, length: int) -> Callable[[], Any]:
    """A prompt of `length` tokens at once: fills a cache, gives the logits of the next token."""
    ids = jnp.zeros((1, length), jnp.int32)  # Which tokens they are does not matter to the time.

    def whole(model: Any, ids: Any) -> Any:
        return model.prefill(ids, ids.shape[1])

    run = with_flat_arguments(whole, model)
    return lambda: run(ids)


class Decoding:
    """Greedy decoding, one token at a time, by one compiled step. To be timed, call it.

    A call decodes `steps` tokens with `CONTEXT` tokens in the cache. What the cache holds by then
    does not matter to the time.
    """

    def __init__(self, model: Any, steps: int = STEPS):
        def step(model: Any, ids: Any, cache: Any) -> Any:
            logits, cache = model.decode(ids, cache, last_only=True)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        # The old cache is never read again, so the new one takes its memory.
        self.step = with_flat_arguments(step, model, donate_argnums=(2,))
        self.room = CONTEXT + steps
        self.steps = steps
        self.cache = model.init_cache(1, self.room)

    def _start_at(self, position: int) -> Any:
        return dataclasses.replace(self.cache, position=jnp.asarray(position, jnp.int32))

    def __call__(self) -> Any:
        ids, cache = jnp.zeros((1, 1), jnp.int32), self._start_at(CONTEXT)
        for _ in range(self.steps):
            ids, cache = self.step(ids, cache)
        self.cache = cache
        return ids

    def complete(self, prompt: Sequence[int], stop: int | None) -> list[int]:
        """The likeliest continuation of `prompt`, up to `stop` or the end of the cache.

        It reads the prompt one token at a time too, which spares compiling another program.
        """
        cache, new = self._start_at(0), list[int]()
        for position in range(self.room):
            token = prompt[position] if position < len(prompt) else new[-1]
            ids, cache = self.step(jnp.full((1, 1), token, jnp.int32), cache)
            if position >= len(prompt) - 1:
                new.append(int(ids[0, 0]))
                if new[-1] == stop or len(new) == NEW_TOKENS:
                    break
        self.cache = cache
        return [token for token in new if token != stop]
