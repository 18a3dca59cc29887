"""Rounding inside a kernel gives the codes and scales of `quantize_array`, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, same_bits

from jaxquant.numerics import decode, E4M3, E5M2, encode, Format, INT4, INT8
from jaxquant.ops import _pallas as pallas
from jaxquant.ops.dot._mosaic_tpu_round import nearest, round_rows, Rounding
from jaxquant.qarray import quantize_array, Scheme, Tile


@pytest.mark.parametrize("k, group, steps", [(256, 256, 1), (512, 128, 2), (512, 512, 2)])
@pytest.mark.parametrize("rows, dtype", [(1, "float32"), (40, "bfloat16"), (96, "float32")])
@pytest.mark.parametrize("format", [INT8, INT4, E4M3, E5M2], ids=str)
def test_codes_and_scales_are_those_of_the_array(
    format: Format, rows: int, dtype: str, k: int, group: int, steps: int
):
    x = np.array(normal(rows, k)) * 10.0 ** (np.arange(rows) % 10 * 8 - 36)[:, None]
    if rows > 4:
        x[1], x[2, 130], x[3, 5], x[4, 200] = 0, np.inf, 1e-45, 3e38
    x = jnp.asarray(x, dtype)
    rounding = Rounding(format=format, factor=1 / format.highest, group=group)
    groups = (steps, k // group // steps) if group < k else (1, 1)

    def kernel(x_ref, codes_ref, scale_ref):
        def held(values):
            return values.astype(jnp.float32)

        round_rows(x_ref, codes_ref, scale_ref, rounding, held)

    def whole(*shape):
        return pallas.BlockSpec(shape, lambda i: (0,) * len(shape))

    shapes = (steps, rows, k // steps), (groups[0], rows, groups[1])
    codes, scale = pallas.tpu_call(
        kernel,
        name="round",
        grid=(1,),
        semantics=("arbitrary",),
        in_specs=[whole(rows, k)],
        out_specs=[whole(*shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        scratch=(),
        vmem_bytes=None,
        interpret=True,
    )(x)
    scheme = Scheme(values=format, tile=Tile(contracted=None if group == k else group))
    q = jax.jit(lambda x: quantize_array(x, scheme))(x)
    assert same_bits(scale.transpose(1, 0, 2).reshape(rows, -1), q.scale)
    expected = decode(q.codes, format, jnp.float32)
    np.testing.assert_array_equal(codes.transpose(1, 0, 2).reshape(rows, k), expected)


def test_a_row_with_nan_has_a_scale_that_is_nan():
    """In any place of it, whatever stands behind."""
    x = np.ones((8, 200), np.float32)
    for row, at in enumerate([0, 1, 127, 128, 150, 199]):
        x[row, at] = np.nan
    rounding = Rounding(format=INT8, factor=1 / 127, group=200)

    def kernel(x_ref, codes_ref, scale_ref):
        round_rows(x_ref, codes_ref, scale_ref, rounding, lambda values: values)

    whole = [pallas.BlockSpec(s, lambda i: (0, 0, 0)) for s in ((1, 8, 200), (1, 8, 1))]
    codes, scale = pallas.tpu_call(
        kernel,
        name="round",
        grid=(1,),
        semantics=("arbitrary",),
        in_specs=[pallas.BlockSpec((8, 200), lambda i: (0, 0))],
        out_specs=whole,
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 200), (1, 8, 1))],
        scratch=(),
        vmem_bytes=None,
        interpret=True,
    )(jnp.asarray(x))
    np.testing.assert_array_equal(np.isnan(scale[0, :, 0]), np.arange(8) < 6)
    assert np.isfinite(np.asarray(codes)).all()


@pytest.mark.parametrize("format", [INT8, E4M3, E5M2], ids=str)
def test_nearest_is_what_the_nearest_code_stands_for(format: Format):
    bits = np.arange(2**8, dtype=np.uint8).view(format.storage)
    values = np.unique(np.asarray(bits).astype(np.float32)[np.isfinite(bits.astype(np.float32))])
    between = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, between])
    x = np.concatenate(
        [points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)]
        + [np.asarray([np.nan, np.inf, -np.inf, -0.0, 2.0**-126, 3e38, -3e38])]
    ).astype(np.float32)
    x = jnp.asarray(np.concatenate([x, np.asarray(normal(1000)) * 50]))
    expected = decode(encode(x, format), format, jnp.float32)
    np.testing.assert_array_equal(nearest(x, format), expected)
