"""Every element is written, whatever does not divide; and what a tile's scale is constant over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import Case, operands, product, stored_for
from quantized import normal, SCHEMES

from jaxquant.aot import compile_for, parse_target
from jaxquant.ops import dot_general
from jaxquant.ops.dot import _triton_gpu, _triton_gpu_weight as kernel
from jaxquant.qarray import quantize_array, relayout


def _problem(rows: int, k: int, n: int, name: str, dtype=jnp.bfloat16):
    case = Case(((rows, k), (k, n)), ((1,), (0,)))
    x, w = operands(case, None, name, dtype)
    stored = stored_for("triton_gpu", case, w)
    problem = _triton_gpu.weight_problem(x, stored, dtype, True)
    return problem, (x, *_triton_gpu._parts(stored)), product(case, x, w)


@pytest.mark.parametrize(
    "rows, k, n, name",
    [
        (1, 576, 70, "int4 zero g64"),
        (70, 256, 130, "int4 g32 bfloat16"),
        (3, 4160, 24, "int8 channel"),
        (17, 512, 24, "int3 g32"),
        (3, 4224, 24, "nf4"),
    ],
)
def test_memory_of_nan_is_written_all_over(rows: int, k: int, n: int, name: str):
    problem, parts, _ = _problem(rows, k, n, name)
    dtype = problem.out_dtype if problem.tiling.splits == 1 else jnp.float32
    poison = jnp.full((problem.tiling.splits, rows, n), jnp.nan, dtype)
    got = kernel.weight_only(problem, *parts, poison=poison)
    assert np.isfinite(np.asarray(got).astype(np.float32)).all()
    np.testing.assert_array_equal(got, kernel.weight_only(problem, *parts))


def test_poison_stays_where_nothing_is_written():
    """So that the test above can fail."""

    def two_rows(poison_ref, o_ref):
        kernel.gpu_store(o_ref.at[kernel.ds(0, 2), kernel.ds(0, 4)], jnp.zeros((2, 4)))

    poison = jnp.full((3, 4), jnp.nan)
    left = kernel.gpu_call(
        two_rows,
        name="two_rows",
        grid=(1,),
        out_shape=poison,
        warps=4,
        stages=1,
        interpret=True,
        in_out={0: 0},
    )(poison)
    np.testing.assert_array_equal(np.isnan(np.asarray(left)).any(1), [False, False, True])


def test_the_tile_within_which_a_scale_is_constant():
    unit = kernel.least_unit
    # One scale an output, or groups of 128 in blocks of 128: a tile has one scale.
    assert unit(64, 4096, 128, 4096, 64, 2) == 64
    assert unit(64, 128, 128, 4096, 64, 2) == 64
    assert unit(64, 32, 128, 4096, 64, 2) == 32
    # The second run starts at 288, in the middle of a group of 64.
    assert unit(64, 64, 576, 576, 288, 2) == 32
    assert unit(64, 100, 4096, 4096, 4096, 1) == 4


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "nf4", "mxfp4"])
def test_terms_of_float32_lose_nothing_that_float32_has(name: str):
    """Where weights are powers of two and rows hold one number, sums have nothing to round."""
    problem, (x, *parts), expected = _problem(3, 256, 24, name, jnp.float32)
    one = jnp.zeros_like(x).at[:, 7].set(x[:, 7])
    got = np.asarray(kernel.weight_only(problem, one, *parts)).astype(np.float64)
    whole = np.asarray(kernel.weight_only(problem, jnp.eye(256)[7:8].repeat(3, 0), *parts))
    wanted = np.asarray(x)[:, 7:8].astype(np.float64) * whole.astype(np.float64)
    assert expected.shape == got.shape
    assert (np.abs(got - wanted) <= 2.0**-21 * np.abs(wanted)).all()


H100, _ = parse_target("h100")


@pytest.mark.aot
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize(
    "name", ["int4 lowest g128 float16", "int4 zero g64", "int8 channel", "nf4", "mxfp4"]
)
def test_what_the_compiler_makes_of_it_for_an_h100(name: str, rows: int):
    """No spills, tensor cores in the loop, loads of 16 bytes, two blocks at once."""
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    plain = quantize_array(normal(256, 8), SCHEMES[name], contracted=(0,))
    layout = _triton_gpu.layout_for(plain, (0,), ())
    make = lambda w: relayout(quantize_array(w, SCHEMES[name], contracted=(0,)), layout)  # noqa: E731
    w = jax.eval_shape(make, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    numbers = (((1,), (0,)), ((), ()))
    compiled = compile_for(lambda x, w: dot_general(x, w, numbers), (x, w), H100)
    [found] = [k for k in compiled.kernels if k.name.startswith("weight_only")]
    assert (found.spill_bytes, found.stack_bytes, found.warnings) == (0, 0, ())
    assert found.matrix_in_loops and all("wgmma" in kind for kind in found.matrix_in_loops)
    # Scales, of 1 to 4 bytes, are read by the thread that needs them.
    assert found.loads_in_loops[16] > 0 and not {8} & set(found.loads_in_loops)
    assert H100.multiprocessor is not None
    assert found.blocks(H100.multiprocessor) >= 2
