"""Named recipes of training: in few bits from the start, or from a model that is there.

Those of low-precision training leave the embedding and the head high, as their sources do.
"""

import dataclasses

from ..intercept import Recipe, Rule
from ..numerics import E4M3, E5M2, INT4, INT8
from ..qarray import PER_CHANNEL, PER_TENSOR, Scheme, schemes, Tile
from ..training import Delayed, LoRA, LSQ, Start, Training, WayBack
from ._ends import LEAVE_ENDS

_INT8 = Scheme(values=INT8, tile=PER_CHANNEL)
_E4M3 = Scheme(values=E4M3, tile=PER_CHANNEL)

W4A8_LSQ = Recipe(
    name="w4a8_lsq",
    source="Learned Step Size Quantization (Esser et al. 2020, arXiv:1902.08153), scales of "
    "weights alone, started from the ranges of rounding",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=Scheme(values=INT4, tile=PER_CHANNEL),
            activations=_INT8,
            training=Training(weights=LSQ(start=Start.RANGE)),
        ),
    ),
)

BITNET_B158 = Recipe(
    name="bitnet_b158",
    source="BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), equations 1 to 3",
    rules=(
        *LEAVE_ENDS,
        Rule(match="*", weights=schemes.TERNARY, activations=_INT8, training=Training()),
    ),
)

QLORA = Recipe(
    name="qlora",
    source="QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantization, frozen, "
    "and adapters of rank 16",
    rules=(
        *LEAVE_ENDS,
        Rule(match="*", weights=schemes.NF4_DOUBLE, adapter=LoRA(rank=16, alpha=32.0)),
    ),
)

_E4M3_TENSOR = Scheme(values=E4M3, tile=PER_TENSOR)
_E5M2_TENSOR = Scheme(values=E5M2, tile=PER_TENSOR)
_E4M3_1X128 = Scheme(values=E4M3, tile=Tile(contracted=128, ragged=True))

# Tokens and widths of training are any number.
_MXFP8 = dataclasses.replace(schemes.MXFP8_E4M3, tile=Tile(contracted=32, ragged=True))

FP8_TRAIN_DELAYED = Recipe(
    name="fp8_train_delayed",
    source="Transformer Engine's DelayedScaling: e4m3, of gradients e5m2, scales from the largest "
    "of the last 1,024 steps (FP8 Formats for Deep Learning, arXiv:2209.05433)",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=_E4M3_TENSOR,
            activations=_E4M3_TENSOR,
            static=True,
            training=Training(
                weights=Delayed(),
                activations=Delayed(),
                way_back=WayBack(gradients=_E5M2_TENSOR, scaling=Delayed()),
            ),
        ),
    ),
)

FP8_TRAIN_CURRENT = Recipe(
    name="fp8_train_current",
    source="Transformer Engine's Float8CurrentScaling, torchao's tensorwise recipe: e4m3, of "
    "gradients e5m2, one scale in all from what is rounded",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=_E4M3_TENSOR,
            activations=_E4M3_TENSOR,
            training=Training(way_back=WayBack(gradients=_E5M2_TENSOR)),
        ),
    ),
)

FP8_TRAIN_ROW = Recipe(
    name="fp8_train_row",
    source="torchao's rowwise recipe: e4m3 everywhere, a scale a row of each product, but for the "
    "power-of-two scales that it has",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=_E4M3,
            activations=_E4M3,
            training=Training(way_back=WayBack(gradients=_E4M3)),
        ),
    ),
)

FP8_TRAIN_BLOCK = Recipe(
    name="fp8_train_block",
    source="DeepSeek-V3 (arXiv:2412.19437, section 3.3): e4m3 everywhere, inputs and gradients in "
    "tiles of 1x128, weights in blocks of 128x128",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=schemes.E4M3_BLOCK,
            activations=_E4M3_1X128,
            training=Training(way_back=WayBack(gradients=_E4M3_1X128, from_codes=True)),
        ),
    ),
)

FP8_TRAIN_MX = Recipe(
    name="fp8_train_mx",
    source="Transformer Engine's MXFP8BlockScaling: e4m3 both ways in blocks of 32 that share a "
    "power of two (OCP Microscaling Formats v1.0), each operand rounded along what is summed",
    rules=(
        *LEAVE_ENDS,
        Rule(
            match="*",
            weights=_MXFP8,
            activations=_MXFP8,
            training=Training(way_back=WayBack(gradients=_MXFP8)),
        ),
    ),
)

TRAINED = (
    W4A8_LSQ,
    BITNET_B158,
    QLORA,
    FP8_TRAIN_DELAYED,
    FP8_TRAIN_CURRENT,
    FP8_TRAIN_ROW,
    FP8_TRAIN_BLOCK,
    FP8_TRAIN_MX,
)
