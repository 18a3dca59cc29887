"""Blocks fill what they cut, hold whole groups and fit a core's memory."""

import pytest

from jaxquant.numerics import UINT3
from jaxquant.ops.dot._mosaic_tpu_blocks import blocks_for
from jaxquant.ops.dot._mosaic_tpu_decode import Cast, Nibbles, Packed
from jaxquant.ops.dot._mosaic_tpu_weight import Blocks, Weight

# Of Llama 3 8B and 70B, Qwen3 and SmolLM2, whole and an eighth of them.
SIZES = [192, 512, 576, 1024, 1536, 1792, 4096, 5120, 8192, 12288, 14336, 25600, 28672, 128 * 97]
DECODERS = {
    "cast": (Cast(), 8),
    "nibbles": (Nibbles(signed=True), 4),
    "packed": (Packed(format=UINT3, block=1024), 3),
}


@pytest.mark.parametrize("decoder, bits", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("k", SIZES)
def test_blocks_hold_whole_units_and_groups(k: int, group: int | None, decoder, bits: int):
    weight = Weight(k=k, n=4096, group=group or k, decoder=decoder)
    blocks = blocks_for(300, weight, bits)
    if group == 128 and k == 576 or group == 128 and k == 192:
        # The last group is short: one block holds all of them.
        assert isinstance(blocks, Blocks) and blocks.k == k
    if group is not None and k % (8 * group) and k * 1024 * bits // 8 > 2**22 and bits == 3:
        # Parts of whole groups are none, by eights, and whole columns are too many.
        assert blocks == f"no blocks along {k} hold whole groups of {group}"
        return
    assert isinstance(blocks, Blocks), blocks
    assert k % blocks.k == 0 and blocks.k % blocks.unit == 0
    assert blocks.unit % decoder.least_unit == 0 and blocks.n % decoder.least_columns == 0
    assert group is None or blocks.k == k or blocks.k % group == 0
    whole = weight.group
    assert blocks.unit % whole == 0 or whole % blocks.unit == 0 or whole == k
    # Two blocks of codes are on their way at once, in at most half of 16 MB.
    assert 2 * blocks.k * blocks.n * bits / 8 <= 2**23
    # Activations that are kept for several steps along `k` fill at most a quarter of that.
    assert blocks.rows == (128 if blocks.k <= 6144 else 64) or blocks.k < k
    assert blocks.k == k or 2 * blocks.rows * k <= 2**22


def test_scales_come_eight_groups_at_a_time():
    # Mosaic wants it of a block that is not the whole array.
    weight = Weight(k=14336, n=4096, group=128, decoder=Nibbles(signed=True))
    blocks = blocks_for(16, weight, 4)
    assert isinstance(blocks, Blocks) and blocks.k < 14336 and blocks.k % (8 * 128) == 0


@pytest.mark.parametrize("k, groups", [(14336, 32), (14336, 64), (8192, 64), (28672, 64)])
def test_narrower_scales_and_zero_points_come_in_more_groups(k: int, groups: int):
    # Registers have 32 rows of bytes, 64 of 4 bits.
    weight = Weight(k=k, n=4096, group=64, decoder=Nibbles(signed=False), register_groups=groups)
    blocks = blocks_for(512, weight, 4)
    assert isinstance(blocks, Blocks) and (blocks.k == k or blocks.k // 64 % groups == 0)


def test_many_columns_are_read_in_wider_blocks_where_there_are_rows_to_multiply():
    weight = Weight(k=4096, n=14336, group=128, decoder=Nibbles(signed=True))
    few, many = blocks_for(16, weight, 4), blocks_for(64, weight, 4)
    assert isinstance(few, Blocks) and isinstance(many, Blocks)
    assert (few.n, many.n, many.columns) == (512, 1024, 512)


def test_cores_get_the_same_number_of_tiles_or_one_gets_all():
    even = blocks_for(8, Weight(k=4096, n=4096, group=128, decoder=Cast()), 4, cores=2)
    odd = blocks_for(8, Weight(k=4096, n=3 * 512, group=128, decoder=Cast()), 4, cores=2)
    assert isinstance(even, Blocks) and even.cores == 2
    assert isinstance(odd, Blocks) and odd.cores == 1


def test_what_has_no_blocks_is_refused_by_its_sizes():
    said = blocks_for(8, Weight(k=100, n=512, group=100, decoder=Nibbles(signed=True)), 4)
    assert said == "groups of 100 along 100 do not fill units of 64 or more"
