"""One row times one large weight: what decoding comes down to."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..algorithms import quantize
from ..intercept import plan as make_plan, prepare, Recipe, Rule, wrap
from ..numerics import INT4, INT8
from ..qarray import PER_CHANNEL, Scheme, Tile
from ._sides import FLOAT, with_flat_arguments

SHAPE = (4096, 14336)
"""Contracted and kept: the MLP of an 8-billion-parameter Llama."""


def layer_sides(shape: tuple[int, int] = SHAPE) -> dict[str, Callable[[], Any]]:
    """The product in float32, with int8 weights, and with int4 weights packed or not."""
    contracted, kept = shape
    model = nnx.Linear(contracted, kept, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, contracted))
    int8 = Scheme(values=INT8, tile=PER_CHANNEL)
    int4 = Scheme(values=INT4, tile=Tile(contracted=64))
    models: dict[str, Any] = {FLOAT: model}
    for name, scheme, packed in (
        ("w8a16", int8, False),
        ("int4 g64, 1 a byte", int4, False),
        ("int4 g64, 2 a byte", int4, True),
    ):
        recipe = Recipe(name=name, rules=(Rule(match="kernel", weights=scheme),))
        plan = make_plan(model, nnx.state(model), x, recipe=recipe)
        qvariables = prepare(quantize(nnx.state(model), plan), plan, packed=packed)
        models[name] = wrap(model, plan, qvariables)
    return {name: _product(m, x) for name, m in models.items()}


def _product(model: Any, x: jax.Array) -> Callable[[], Any]:
    run = with_flat_arguments(lambda model, x: model(x), model)
    x = jnp.asarray(x)
    return lambda: run(x)
