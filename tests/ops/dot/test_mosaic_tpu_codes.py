"""The kernel for codes by codes, interpreted: each way in which a generation multiplies them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantized import normal, uneven

from jaxquant.numerics import decode, E4M3, E5M2, encode, Format, INT4, INT8
from jaxquant.ops.dot._mosaic_tpu_codes import CodeBlocks, codes_product, Feed, Pair

WAYS = {
    # Left format, left dtype, right format, how it is fed, products summed at a time.
    "int8": (INT8, jnp.int8, INT8, Feed.STORED, 512),
    "int8 by int4": (INT8, jnp.int8, INT4, Feed.INT8, 512),
    "int8 in bfloat16": (INT8, jnp.bfloat16, INT8, Feed.BFLOAT16, 128),
    "int8 by int4 in bfloat16": (INT8, jnp.bfloat16, INT4, Feed.BFLOAT16, 128),
    "e4m3": (E4M3, jnp.float8_e4m3fn, E4M3, Feed.STORED, 512),
    "e5m2 by e4m3": (E5M2, jnp.float8_e5m2, E4M3, Feed.STORED, 512),
    "e4m3 in bfloat16": (E4M3, jnp.bfloat16, E4M3, Feed.BFLOAT16, 512),
    "e4m3 by bias 11": (E4M3, jnp.bfloat16, E4M3, Feed.BIAS_11, 512),
    "e5m2 by bias 11": (E5M2, jnp.bfloat16, E4M3, Feed.BIAS_11, 512),
}
BLOCKS = {
    "one": CodeBlocks(rows=5, k=512, n=300),
    "ragged columns": CodeBlocks(rows=5, k=512, n=128),
    "ragged rows": CodeBlocks(rows=2, k=512, n=300),
    "steps": CodeBlocks(rows=5, k=128, n=128),
    "cores": CodeBlocks(rows=5, k=256, n=150, cores=2),
}


def _pair(way: str, *, k: int = 512, n: int = 300, groups: tuple[int, int] = (512, 512)) -> Pair:
    left, dtype, _, feed, longest = WAYS[way]
    return Pair(
        k=k,
        n=n,
        group=min(groups),
        left_group=groups[0],
        right_group=groups[1],
        integer=left.integer,
        left=np.dtype(dtype),
        right=feed,
        longest=longest,
    )


def _sides(way: str, k: int = 512) -> tuple[jax.Array, jax.Array]:
    left, _, right, _, _ = WAYS[way]
    return (
        encode(normal(5, k, seed=1) * np.float32(left.highest / 3), left),
        encode(normal(k, 300, seed=2) * np.float32(right.highest / 3), right),
    )


def _values(codes: jax.Array, format: Format) -> np.ndarray:
    return np.asarray(decode(codes, format, jnp.float32)).astype(np.float64)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_sums_of_codes_are_scaled_once(way: str, blocks: CodeBlocks):
    """Of integers they are exact: two products with scales and one rounding are left."""
    x, w = _sides(way)
    x_scale, scale = abs(uneven(5, 1, seed=3)) + 0.1, abs(uneven(1, 300, seed=4)) + 0.1
    got = codes_product(
        x, x_scale, w, scale, None, pair=_pair(way), blocks=blocks, out_dtype=jnp.float32,
        interpret=True,
    )  # fmt: skip
    left, right = _values(x, WAYS[way][0]), _values(w, WAYS[way][2])
    by = np.asarray(x_scale).astype(np.float64) * np.asarray(scale)
    expected = left @ right * by
    if WAYS[way][0].integer:
        allowed = 2 * np.spacing(np.abs(expected).astype(np.float32))
    else:
        allowed = (512 + 4) * 2.0**-24 * (np.abs(left) @ np.abs(right)) * by
    # What was not written would be NaN.
    assert (np.abs(np.asarray(got) - expected) <= allowed).all()


@pytest.mark.parametrize("way", ["int8", "int8 by int4 in bfloat16", "e4m3", "e4m3 by bias 11"])
@pytest.mark.parametrize("step", [512, 256])
@pytest.mark.parametrize("groups", [(128, 128), (512, 128), (128, 256)])
def test_the_sums_of_groups_are_scaled_apart(way: str, groups: tuple[int, int], step: int):
    x, w = _sides(way)
    tiles = [512 // g for g in groups]
    x_scale = abs(uneven(5, tiles[0], seed=3)) + 0.1
    scale = abs(uneven(tiles[1], 300, seed=4)) + 0.1
    got = codes_product(
        x, x_scale, w, scale, None, pair=_pair(way, groups=groups),
        blocks=CodeBlocks(rows=5, k=step, n=128), out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    left = _values(x, WAYS[way][0]) * np.repeat(np.asarray(x_scale), groups[0], axis=1)
    right = _values(w, WAYS[way][2]) * np.repeat(np.asarray(scale), groups[1], axis=0)
    allowed = (512 + 8) * 2.0**-24 * (np.abs(left) @ np.abs(right))
    assert (np.abs(np.asarray(got) - left @ right) <= allowed).all()


@pytest.mark.parametrize("way", ["int8 by int4", "e4m3 by bias 11"])
def test_a_last_group_may_be_short(way: str):
    x, w = _sides(way, k=320)
    x_scale, scale = abs(uneven(5, 3, seed=3)) + 0.1, abs(uneven(3, 300, seed=4)) + 0.1
    got = codes_product(
        x, x_scale, w, scale, None, pair=_pair(way, k=320, groups=(128, 128)),
        blocks=CodeBlocks(rows=5, k=320, n=128), out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    left = _values(x, WAYS[way][0]) * np.repeat(np.asarray(x_scale), 128, axis=1)[:, :320]
    right = _values(w, WAYS[way][2]) * np.repeat(np.asarray(scale), 128, axis=0)[:320]
    allowed = (320 + 8) * 2.0**-24 * (np.abs(left) @ np.abs(right))
    assert (np.abs(np.asarray(got) - left @ right) <= allowed).all()


@pytest.mark.parametrize("way", ["int8", "int8 in bfloat16"])
@pytest.mark.parametrize("step", [4096, 2048])
def test_integers_are_summed_exactly_at_the_ends(way: str, step: int):
    """float32 holds sums of 1024 such products, and no more: -128 * -128 * 1024 = 2^24."""
    low = np.full((1, 4096), -128)
    mixed = np.where(np.arange(4096) % 3 == 0, -128, 127)[None]
    x = np.concatenate([low, -1 - low, mixed, -1 - mixed]).astype(np.int8)
    w = np.concatenate([x, np.roll(x, 1, axis=1)]).T.repeat(16, axis=1)
    pair = Pair(
        k=4096, n=128, group=4096, left_group=4096, right_group=4096, integer=True,
        left=np.dtype(WAYS[way][1]), right=WAYS[way][3], longest=1024,
    )  # fmt: skip
    got = codes_product(
        jnp.asarray(x), jnp.ones((4, 1)), jnp.asarray(w), jnp.ones((1, 128)), None, pair=pair,
        blocks=CodeBlocks(rows=4, k=step, n=128), out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    sums = x.astype(np.int64) @ w.astype(np.int64)
    assert sums.max() == 2**26 and (sums % 2 != 0).any()
    np.testing.assert_array_equal(np.asarray(got), sums.astype(np.float32))


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("e4m3")])
def test_every_code_of_e4m3_is_multiplied_as_what_it_stands_for(way: str):
    """-0 too, which is the NaN of the e4m3 that generations 5 and 6 have."""
    w = np.arange(256, dtype=np.uint8)
    w[[0x7F, 0xFF]] = 0x80  # NaN
    w = jnp.asarray(w.view(ml_dtypes.float8_e4m3fn)).reshape(256, 1)
    w = jnp.concatenate([jnp.roll(w, i, axis=0) for i in range(128)], axis=1)
    x = jnp.eye(256).astype(jnp.float8_e4m3fn)
    pair = _pair(way, k=256, n=128, groups=(256, 256))
    got = codes_product(
        x, jnp.ones((256, 1)), w, jnp.ones((1, 128)), None, pair=pair,
        blocks=CodeBlocks(rows=256, k=256, n=128), out_dtype=jnp.float32, interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(got), np.asarray(w).astype(np.float32))


def test_bias_is_added_before_the_result_is_rounded():
    x, w = _sides("int8")
    ones, bias = jnp.ones((1, 300)), normal(300, seed=9) * 1000
    pair, blocks = _pair("int8"), BLOCKS["ragged columns"]

    def product(bias, dtype):
        return codes_product(
            x, jnp.ones((5, 1)), w, ones, bias, pair=pair, blocks=blocks, out_dtype=dtype,
            interpret=True,
        )  # fmt: skip

    whole = product(None, jnp.float32) + bias[None]
    np.testing.assert_array_equal(product(bias, jnp.float32), whole)
    np.testing.assert_array_equal(product(bias, jnp.bfloat16), whole.astype(jnp.bfloat16))
