"""Targets are parsed once, and their figures agree with each other and with JAX's own table."""

import dataclasses

import pytest

from jaxquant.aot import parse_target, TARGETS
from jaxquant.aot._targets import H100, TPU7X, V4, V5E, V5P, V6E


@pytest.mark.parametrize(
    ("text", "target", "shape", "devices"),
    [
        ("v5e", V5E, (), 1),
        ("v5e:1x1", V5E, (), 1),
        ("v5e:2x4", V5E, (2, 4), 8),
        ("v6e:4x4", V6E, (4, 4), 16),
        ("V5P:2x2x2", V5P, (2, 2, 2), 8),
        ("v4", V4, (), 1),
        ("7x:2x2x1", TPU7X, (2, 2, 1), 8),
        ("h100", H100, (), 1),
        ("h100:1", H100, (), 1),
        ("h100:8", H100, (1, 1, 8), 8),
        ("h100:1x1x8", H100, (1, 1, 8), 8),
    ],
)
def test_a_target_and_its_slice(text, target, shape, devices):
    assert parse_target(text) == (target, shape)
    assert target.devices(shape) == devices


@pytest.mark.parametrize("text", ["", "v3", "tpu", "v5e:", "v5e:2y2", "v5e:-2x2"])
def test_an_unknown_target_is_refused_with_those_known(text):
    with pytest.raises(ValueError, match=r"is no target\. Known are v4, v5e, v5p, v6e, 7x, h100"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("v5e:2x2x1", "a shape of 3 numbers where v5e wants 2"),
        ("v5p:2x2", "a shape of 2 numbers where v5p wants 3"),
        ("v5e:0x2", "none of them 0"),
        ("v5e:3x3", "hosts have 2x2 chips"),
        ("7x:1x1x1", "a chip of 2 devices"),
    ],
)
def test_a_shape_that_is_no_slice_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        parse_target(text)


# Matrix units of a device, their side, and the results of a cycle that the published peak implies.
_UNITS = {"v4": (8, 128, 1), "v5e": (4, 128, 1), "v5p": (8, 128, 1), "v6e": (2, 256, 2)}
_UNITS |= {"7x": (2, 256, 2)}


@pytest.mark.parametrize("name", _UNITS)
def test_the_clock_makes_the_published_peak(name):
    """Clocks are given to 0.05 GHz: half of that is the most by which the product can be off."""
    units, side, results = _UNITS[name]
    target = TARGETS[name]
    per_cycle = 2 * side**2 * units * results
    assert target.matrix_ops["bf16"] == pytest.approx(
        per_cycle * target.clock_hz, abs=per_cycle * 0.025e9
    )


@pytest.mark.parametrize("name", TARGETS)
def test_every_figure_has_a_source(name):
    target = TARGETS[name]
    assert {"hbm", "matrix_ops", "clock"} <= set(target.sources)
    assert "vmem" in target.sources or target.vmem_bytes is None
    assert (target.vmem_bytes is None) == (target.platform == "cuda")
    assert (target.multiprocessor is None) == (target.platform == "tpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.clock_hz = 1.0
