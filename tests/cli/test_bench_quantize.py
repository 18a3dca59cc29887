"""`jaxquant bench quantize`: a copy that copies, and what each scheme reads a second."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxquant.cli._bench_quantize import COPY, quantize_sides, SCHEMES, throughput_rows
from jaxquant.evaluate import Timing


def test_every_scheme_is_timed_against_the_copy(jaxquant, tmp_path):
    options = ("--size", 128, "--rounds", 3, "--json", tmp_path / "b.json")
    ran = jaxquant("bench", "quantize", *options)
    assert ran.code == 0 and ran.err == ""
    result = json.loads((tmp_path / "b.json").read_text())
    assert (result["bench"], result["bytes"]) == ("quantize", 4 * 128 * 128)
    assert [side["name"] for side in result["sides"]] == [COPY, *SCHEMES]
    for side in result["sides"]:
        assert len(side["seconds"]) == 3 and side["ratio"] > 0
        assert side["gigabytes_per_second"] == pytest.approx(
            1e-9 * result["bytes"] / side["median_seconds"]
        )
        assert side["name"] in ran.out


def test_the_copy_writes_every_byte_to_memory_of_its_own():
    copy = quantize_sides(128)[COPY]
    one, two = copy(), copy()
    assert one.unsafe_buffer_pointer() != two.unsafe_buffer_pointer()
    expected = jax.random.normal(jax.random.key(0), (128, 128))
    assert one.nbytes == 4 * 128 * 128 and bool((one == expected).all())
    assert "copy" in jax.jit(jnp.copy).lower(one).compile().as_text()


def test_rows_by_hand():
    timings = {COPY: Timing(seconds=(1.0, 1.0, 3.0)), "a": Timing(seconds=(2.0, 4.0, 4.0))}
    rows = throughput_rows(timings, 1000)
    assert [row["gigabytes_per_second"] for row in rows] == pytest.approx([4e-3, 1e-3])
    assert [row["ratio"] for row in rows] == [1.0, 0.5]


def test_a_size_that_groups_do_not_fill_and_a_model_are_refused(jaxquant):
    ran = jaxquant("bench", "quantize", "--size", 100)
    assert ran.code == 2 and "--size 100 is not a multiple of 64" in ran.err
    ran = jaxquant("bench", "quantize", "--model", "a")
    assert ran.code == 2 and "bench quantize has no model and no recipe" in ran.err
