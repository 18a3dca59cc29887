import jax
import jax.numpy as jnp
import moe
from flax import nnx
from tiny_configs import LLAMA

from jaxquant.calibrate._segments import cut, moving_side
from jaxquant.intercept import trace
from jaxquant.models import Llama


def llama():
    model = Llama(LLAMA, rngs=nnx.Rngs(0))
    return trace(model, nnx.state(model), jax.ShapeDtypeStruct((2, 6), jnp.int32))


def linear(mark):
    return "embed" not in mark.root.path


def names(segment):
    return [step.mark.root.path.split("/")[-2] for step in segment.sites]


def test_levels_of_a_decoder_are_its_groups():
    segments = cut(llama(), linear)
    layer = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert [names(s) for s in segments] == layer * LLAMA.layers


def test_sites_of_a_group_read_one_value():
    for segment in cut(llama(), linear):
        if names(segment) in (["q", "k", "v"], ["gate", "up"]):
            assert len({moving_side(step) for step in segment.sites}) == 1


def test_every_needed_equation_on_the_way_is_in_one_segment():
    graph = llama()
    segments = cut(graph, linear)
    seen: set[int] = set()
    for segment in segments:
        moving = {id(s) for s in segment.part.steps if any(v in graph.moving for v in s.reads)}
        assert not moving & seen
        seen |= moving
    # All sites but the last are evaluated, each once.
    sites = [id(step) for step in graph.sites if linear(step.mark)]
    assert sorted(sites[:-1]) == sorted(i for i in sites if i in seen)


def test_a_segment_reads_only_what_is_kept_or_fixed():
    graph = llama()
    kept = set(graph.arguments)
    for segment in cut(graph, linear):
        for value in segment.part.inputs:
            assert value in kept or value not in graph.moving
        kept |= set(segment.part.outputs)
        for step in segment.sites:
            assert moving_side(step) in kept
        assert set(segment.done) <= kept
        kept -= set(segment.done)
    # What the last sites and the rest of the model read is all that is left: the stream, too.
    assert kept > {moving_side(step) for step in segment.sites}
    assert len(kept) == 2


def test_scanned_layers_are_levels_as_layers_side_by_side():
    def of(scanned):
        model = moe.Decoder(scanned=scanned)
        shapes = jax.eval_shape(model.init, jax.random.key(0), moe.TOKENS)
        segments = cut(trace(model, shapes, moe.TOKENS), linear)
        return [[s.mark.root.path.split("/")[-2:] for s in x.sites] for x in segments]

    def last(levels):
        return [[path[-1] if path[0] == "experts" else path[0] for path in x] for x in levels]

    assert last(of(True)) == last(of(False))
    assert last(of(True))[:5] == [["query", "key", "value"], ["out"], ["router"], ["up"], ["down"]]
