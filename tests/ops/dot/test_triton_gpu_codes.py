"""Codes by codes: every element is written, and steps stay within groups."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.ops.dot import _triton_gpu_codes as kernel

PROBLEM = kernel.CodesProblem(
    rows=5,
    n=70,
    k=512,
    tile=(1, 512),
    group=512,
    integer=True,
    out_dtype=np.dtype(np.float32),
    step=128,
    row_tile=16,
    outputs=64,
    splits=1,
    warps=4,
    stages=3,
    interpret=True,
)


def _run(p: kernel.CodesProblem, poisoned: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, (size, p.k)).astype(np.int8) for size in (p.rows, p.n))
    own = rng.uniform(1, 2, (-(-p.n // p.tile[0]), -(-p.k // p.tile[1]))).astype(np.float32)
    token = rng.uniform(1, 2, (p.rows, -(-p.k // p.group))).astype(np.float32)
    if not p.integer:
        x, w = (jnp.asarray(a / 127).astype(jnp.float8_e4m3fn) for a in (x, w))
    poison = None
    if poisoned:
        # Integers have no NaN: the lowest one, which no sum reaches.
        raw = p.integer and p.splits > 1 and not p.grouped
        fill, dtype = (-(2**31), jnp.int32) if raw else (jnp.nan, jnp.float32)
        poison = jnp.full((p.splits, p.rows, p.n), fill, dtype)
    got = kernel.codes_by_codes(p, jnp.asarray(x), jnp.asarray(token), w, jnp.asarray(own), poison)
    wide = np.repeat(np.repeat(own, p.tile[0], 0), p.tile[1], 1)[: p.n, : p.k].astype(np.float64)
    tokens = np.repeat(token, p.group, 1)[:, : p.k].astype(np.float64)
    left = np.asarray(x).astype(np.float64) * tokens
    return np.asarray(got), left @ (np.asarray(w).astype(np.float64) * wide).T


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"splits": 4},
        {"rows": 17, "n": 64},
        {"k": 200, "tile": (1, 200), "group": 200},
        {"tile": (128, 128), "group": 128, "n": 130},
        {"tile": (128, 128), "group": 128, "n": 130, "splits": 2},
        {"tile": (32, 64), "group": 128, "step": 64},
        {"integer": False},
        {"integer": False, "tile": (128, 128), "group": 128, "splits": 2},
    ],
    ids=str,
)
def test_sums_are_those_of_the_codes(change: dict, poisoned: bool):
    p = dataclasses.replace(PROBLEM, **change)
    got, expected = _run(p, poisoned)
    # Positive and negative terms cancel; scales are below 2 on either side, codes below 127 or 1.
    size = 4 * p.k * (127.0**2 if p.integer else 1.0)
    assert (np.abs(got - expected) <= (p.k + 8) * 2.0**-24 * size).all()
    if p.integer and not p.grouped:
        assert (np.abs(got - expected) <= 2.0**-22 * np.abs(expected)).all()


def test_a_step_lies_in_one_group_of_each_side():
    assert kernel.widest_step(4096, 4096, 4096) == 128
    assert kernel.widest_step(4096, 128, 64) == 64
    assert kernel.widest_step(4096, 96, 4096) == 32
    assert kernel.widest_step(200, 200, 200) == 128
