"""Equal layers are compiled once, however many there are."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.algorithms import GPTQ, Order
from jaxquant.calibrate import calibrate, token_batches
from jaxquant.models import Llama

INT4_G8 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=8))
RECIPE = jq.Recipe(
    name="gptq",
    rules=(
        jq.Rule(match="*embed*"),
        jq.Rule(match="*", weights=INT4_G8, algorithm=GPTQ(order=Order.STATIC)),
    ),
)


class Compilations:
    """How many programs of any kind XLA compiles."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def _heard(self, event, *_, **__):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._heard)


def run(layers):
    config = dataclasses.replace(LLAMA, layers=layers)
    model = Llama(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 8))
    batches = token_batches(tokens, config.vocab_size, size=2)
    variables = nnx.state(model)
    plan = jq.plan(model, variables, *batches[0], recipe=RECIPE)
    with Compilations() as compilations:
        made = calibrate(model, variables, batches, plan)
    assert len(made.sites) == 7 * layers
    return made.compiled, compilations.count


@pytest.mark.slow
def test_thirty_layers_compile_no_more_than_three():
    compiled, count = run(3)
    # The first segment, which looks up tokens, and those before o, gate and up, and down; what is
    # before the next layer's q, k and v is like what is before gate and up, since o and down are
    # of one shape here. What comes after the last level is not run.
    assert LLAMA.hidden == LLAMA.heads * LLAMA.head_dim
    assert compiled == 4
    again, more = run(30)
    assert again == compiled
    # Algorithms and small programs are there already; the segments are compiled for each run.
    assert compiled <= more <= count
