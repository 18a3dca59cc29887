import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import nnx
from tiny_configs import LLAMA

import jaxquant as jq
from jaxquant.calibrate._compiled import Programs, Watch
from jaxquant.calibrate._roots import root_array
from jaxquant.calibrate._segments import cut, moving_side, part_of
from jaxquant.intercept import Gram, Peak, trace
from jaxquant.intercept._variables import parameters
from jaxquant.models import Llama


def linear(mark):
    return "embed" not in mark.root.path


def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % LLAMA.vocab_size
    return model, nnx.state(model), tokens


def scanned():
    model = moe.Decoder(scanned=True)
    return model, model.init(jax.random.key(0), moe.TOKENS), moe.TOKENS


OBSERVERS = (Gram(), Peak())


def go_through(model, variables, tokens, programs, *, observers=OBSERVERS, narrow=None):
    """All segments, one after the other: the statistics of each site by its root."""
    graph = trace(model, variables, tokens)
    known = parameters(variables)
    values = {graph.arguments[0]: tokens}
    values |= {v: root_array(known, root) for v, root in graph.roots.items()}
    values |= {v: jnp.asarray(x) for v, x in graph.constants.items()}
    found = {}
    for segment in cut(graph, linear):
        watches = [Watch(step=step, observers=observers) for step in segment.sites]
        outs, stats = programs.run(segment.part, values, watches, narrow=narrow)
        values.update(outs)
        for step, each in zip(segment.sites, stats, strict=True):
            found[str(step.mark.root)] = each
    return found


def test_statistics_are_those_of_the_model_as_a_whole():
    model, variables, tokens = llama()
    found = go_through(model, variables, tokens, Programs())
    wanted = jq.observe(model, variables, [(tokens,)], observers=(Gram(), Peak()))
    for path, stats in found.items():
        for name, value in stats.items():
            # The same sums, compiled apart.
            np.testing.assert_allclose(value, wanted[f"{path}#dot"][name], rtol=1e-4, atol=1e-4)
    assert len(found) == 7 * LLAMA.layers


def test_equal_layers_share_their_programs():
    model, variables, tokens = llama()
    programs = Programs()
    go_through(model, variables, tokens, programs)
    # The first segment of a layer differs in the first one: it looks up tokens.
    assert LLAMA.layers > 1
    assert programs.compiled == 5
    go_through(model, variables, tokens, programs)
    assert programs.compiled == 5


def test_other_observers_shapes_and_dtypes_do_not():
    model, variables, tokens = llama()
    programs = Programs()
    go_through(model, variables, tokens, programs)
    go_through(model, variables, tokens, programs, observers=(Peak(),))
    assert programs.compiled == 10
    go_through(model, variables, tokens[:1], programs)
    assert programs.compiled == 15
    go_through(model, variables, tokens, programs, narrow=jnp.bfloat16)
    assert programs.compiled == 20


def test_narrow_products_round_their_operands():
    model, variables, tokens = llama()
    plain = go_through(model, variables, tokens, Programs())
    narrow = go_through(model, variables, tokens, Programs(), narrow=jnp.bfloat16)
    path = "layers/0/mlp/down/kernel"
    off = np.abs(np.asarray(narrow[path]["peak"] - plain[path]["peak"])).max()
    size = float(np.asarray(plain[path]["peak"]).max())
    assert 0 < off < 2.0**-5 * size


def test_a_part_computes_what_it_is_asked_for():
    model, variables, tokens = llama()
    graph = trace(model, variables, tokens)
    known = parameters(variables)
    (norm,) = {moving_side(s) for s in graph.sites if s.mark.site == "layers/0/mlp/up/kernel#dot"}
    maker = next(step for step in graph.steps if norm in step.outputs)
    part = part_of(graph, [maker], [norm])
    values = {v: root_array(known, r) for v, r in graph.roots.items()}
    values |= {v: jnp.ones(graph.avals[v].shape) for v in part.inputs if v not in values}
    outs, stats = Programs().run(part, values)
    assert list(outs) == [norm] and stats == []


@pytest.mark.parametrize("make", [llama, scanned])
def test_layers_differ_only_in_their_values(make):
    model, variables, tokens = make()
    graph = trace(model, variables, tokens)
    segments = cut(graph, linear)
    each = len(segments) // (LLAMA.layers if make is llama else moe.LAYERS)
    for later in range(2 * each, len(segments)):
        a, b = segments[later - each].part, segments[later].part
        assert [s.name for s in a.steps] == [s.name for s in b.steps]
        assert [graph.avals[v].shape for v in a.inputs] == [graph.avals[v].shape for v in b.inputs]
