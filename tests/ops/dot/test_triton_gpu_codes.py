"""Codes by codes: every element is written, and steps stay within groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import SCHEMES

from jaxquant.aot import compile_for, parse_target
from jaxquant.numerics import E4M3
from jaxquant.ops import dot_general
from jaxquant.ops.dot import _triton_gpu, _triton_gpu_codes as kernel
from jaxquant.qarray import QArray, quantize_array, relayout, Scheme, Tile

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


H100, _ = parse_target("h100")


@pytest.mark.aot
@pytest.mark.parametrize("rows", [1, 32, 64])
@pytest.mark.parametrize(
    "scheme, weight, kind",
    [
        ("int8 channel", "int8 channel", "wgmma"),
        # Triton has Hopper's own instruction for fp8 only with sums of fewer bits.
        ("e4m3 channel", "e4m3 channel", "mma.sync"),
        ("e4m3 1x128", "e4m3 block", "mma.sync"),
    ],
)
def test_what_the_compiler_makes_of_it_for_an_h100(scheme: str, weight: str, kind: str, rows: int):
    """No spills, tensor cores in the loop, loads of 16 bytes, two blocks at once."""
    schemes = SCHEMES | {"e4m3 1x128": Scheme(values=E4M3, tile=Tile(contracted=128))}
    numbers = (((1,), (0,)), ((), ()))

    def quantized(name: str, axis: int, *shape: int) -> QArray:
        return jax.eval_shape(
            lambda x: quantize_array(x, schemes[name], contracted=(axis,)),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        )

    x, w = quantized(scheme, 1, rows, 4096), quantized(weight, 0, 4096, 14336)
    w = jax.eval_shape(lambda w: relayout(w, _triton_gpu.layout_for(w, (0,), ())), w)
    compiled = compile_for(lambda x, w: dot_general(x, w, numbers), (x, w), H100)
    [found] = [k for k in compiled.kernels if "_by_" in k.name]
    assert (found.spill_bytes, found.stack_bytes, found.warnings) == (0, 0, ())
    assert found.matrix_in_loops and all(name.startswith(kind) for name in found.matrix_in_loops)
    assert found.loads_in_loops[16] > 0 and not {8} & set(found.loads_in_loops)
    assert H100.multiprocessor is not None
    assert found.blocks(H100.multiprocessor) >= 2
