"""Named recipes: published combinations, as values. `configs/` has each as a file to start from.

All leave norms alone: a norm multiplies element by element, so it is no site. Unless its name says
otherwise, a recipe also leaves the embedding and the logits, as the libraries that it follows do:
they are the first and the last thing a model does to a token, and much of a small model's bytes.
"""

import dataclasses
import os
from pathlib import Path

from ..algorithms import AWQ, GPTQ, HQQ, Order, RangeSearch, SmoothQuant
from ..intercept import Recipe, Rule
from ..numerics import (
    AbsMax,
    BFLOAT16,
    Convention,
    E4M3,
    ExponentRule,
    FLOAT16,
    Format,
    INT3,
    INT4,
    INT8,
    MinMax,
    SharedExponent,
    UINT2,
    UINT4,
)
from ..ops import Outliers
from ..qarray import PER_CHANNEL, PER_TENSOR, Scheme, schemes, Tile
from ._ends import EMBEDDING as _EMBEDDING, HEAD as _HEAD, LEAVE_ENDS as _LEAVE_ENDS
from ._names import nearest
from ._parse import load
from ._trained import TRAINED

_INT8 = Scheme(values=INT8, tile=PER_CHANNEL)
_E4M3 = Scheme(values=E4M3, tile=PER_CHANNEL)
_INT4_G64 = Scheme(
    values=INT4,
    tile=Tile(contracted=64),
    # 16 bits, so that a weight costs 4 + 16 / 64 = 4.25. Codes are chosen for the scale as it is
    # stored, so its 8-bit mantissa costs little; its exponent is float32's, so that a group of
    # tiny weights keeps its scale, where FLOAT16 ends at 6e-5.
    scale=BFLOAT16,
    # As ggml's Q4_0: the largest weight of a group meets -8, whatever its sign, so that all sixteen
    # codes are of use; a weight of about that size and the other sign is clipped, by a gap at most.
    # On SmolLM2-135M the divergence is 0.8 of that of peak / 7.5, which compressed-tensors takes.
    range=AbsMax(convention=Convention.SIGNED),
)

_INT4_G128 = dataclasses.replace(_INT4_G64, tile=Tile(contracted=128))
_INT3_G64 = dataclasses.replace(_INT4_G64, values=INT3)


def _with_zeros(values: Format, scale: Format, zero_point: Format) -> Scheme:
    """Groups of 64 from their least to their largest value."""
    tile = Tile(contracted=64)
    return Scheme(values=values, tile=tile, scale=scale, range=MinMax(), zero_point=zero_point)


_UINT4_G64 = _with_zeros(UINT4, BFLOAT16, UINT4)
_MXFP4 = dataclasses.replace(schemes.MXFP4, range=SharedExponent(rule=ExponentRule.EVEN))
# Ten times the paper's damping.
_GPTQ = GPTQ(order=Order.STATIC, damping=0.1, search=RangeSearch(), correction=0.5)
_SMOOTHQUANT = SmoothQuant(alpha=0.5)

W8A16 = Recipe(
    name="w8a16",
    source="compressed-tensors preset W8A16: int8 weights, symmetric, one scale a channel",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT8)),
)

W4A16_G64 = Recipe(
    name="w4a16_g64",
    source="groups of 64 rounded to nearest, the baseline of GPTQ (Frantar et al. 2022, "
    "arXiv:2210.17323), with the range of ggml's Q4_0",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT4_G64)),
)

W4A16_G128 = Recipe(
    name="w4a16_g128",
    source="groups of 128 rounded to nearest, the group size that GPTQ (Frantar et al. 2022, "
    "arXiv:2210.17323) and AWQ (Lin et al. 2024, arXiv:2306.00978) report, with the range of "
    "ggml's Q4_0",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT4_G128)),
)

W4A16_G64_E8 = Recipe(
    name="w4a16_g64_e8",
    source="w4a16_g64, with embedding and logits in int8, one scale a row, as ggml keeps them in "
    "more bits than the rest",
    rules=(
        # A lookup and tied logits share one scale a row: both see the features as contracted.
        Rule(match=_EMBEDDING, weights=_INT8, optional=True),
        Rule(match=_HEAD, weights=_INT8, optional=True),
        Rule(match="*", weights=_INT4_G64),
    ),
)

W8A8 = Recipe(
    name="w8a8",
    source="compressed-tensors preset W8A8; token-wise dynamic activations as in ZeroQuant "
    "(Yao et al. 2022, arXiv:2206.01861)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT8, activations=_INT8)),
)

LLM_INT8 = Recipe(
    name="llm_int8",
    source="LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) as in bitsandbytes: columns of "
    "activations that reach 6 are multiplied in floats, with what the int8 weights stand for",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=_INT8, activations=_INT8, outliers=Outliers(threshold=6.0)),
    ),
)

FP8 = Recipe(
    name="fp8",
    source="compressed-tensors preset FP8_DYNAMIC; e4m3 as in FP8 Formats for Deep Learning "
    "(Micikevicius et al. 2022, arXiv:2209.05433)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_E4M3, activations=_E4M3)),
)

MXFP8 = Recipe(
    name="mxfp8",
    source="OCP Microscaling Formats v1.0: e4m3 in blocks of 32 on both sides, as torchao's and "
    "Transformer Engine's MXFP8 inference",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=schemes.MXFP8_E4M3, activations=schemes.MXFP8_E4M3),
    ),
)

MXFP4 = Recipe(
    name="mxfp4",
    source="OCP Microscaling Formats v1.0, weights alone, as gpt-oss (arXiv:2508.10925) holds its "
    "experts; exponents as in compressed-tensors' preset MXFP4A16",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_MXFP4)),
)

NVFP4 = Recipe(
    name="nvfp4",
    source="compressed-tensors preset NVFP4A16 (Pretraining LLMs with NVFP4, arXiv:2509.25149, "
    "for the format)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=schemes.NVFP4)),
)

NF4_DOUBLE = Recipe(
    name="nf4_double",
    source="QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 in blocks of 64 with double "
    "quantization, weights alone",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=schemes.NF4_DOUBLE)),
)

GPTQ_W4_SYM_G64 = Recipe(
    name="gptq_w4_sym_g64",
    source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) with static groups, damping 0.1 and "
    "searched ranges, on the scheme of w4a16_g64; half the correction of QEP (arXiv:2504.09629)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT4_G64, algorithm=_GPTQ)),
)

GPTQ_W4_ASYM_G64 = Recipe(
    name="gptq_w4_asym_g64",
    source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) with static groups and zero points, "
    "damping 0.1 and searched ranges; half the correction of QEP (arXiv:2504.09629)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_UINT4_G64, algorithm=_GPTQ)),
)

GPTQ_W3_SYM_G64 = Recipe(
    name="gptq_w3_sym_g64",
    source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) in 3 bits with static groups, damping 0.1 "
    "and searched ranges; half the correction of QEP (arXiv:2504.09629)",
    rules=(*_LEAVE_ENDS, Rule(match="*", weights=_INT3_G64, algorithm=_GPTQ)),
)

GPTQ_W2_ASYM_G64 = Recipe(
    name="gptq_w2_asym_g64",
    source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) in 2 bits with static groups and zero "
    "points, damping 0.1 and searched ranges; half the correction of QEP (arXiv:2504.09629)",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=_with_zeros(UINT2, BFLOAT16, UINT2), algorithm=_GPTQ),
    ),
)

AWQ_W4_ASYM_G64 = Recipe(
    name="awq_w4_asym_g64",
    source="AWQ (Lin et al. 2024, arXiv:2306.00978): zero points in groups of 64, the loss of the "
    "whole block, half of the candidates with duo scaling as in AutoAWQ; ranges searched by the "
    "inputs' mean squares in place of its clip search",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=_UINT4_G64, scaling=AWQ(), algorithm=RangeSearch()),
    ),
)

SMOOTHQUANT_W8A8 = Recipe(
    name="smoothquant_w8a8",
    source="SmoothQuant (Xiao et al. 2023, arXiv:2211.10438) with alpha 0.5, the setting of "
    "the paper, on the scheme of w8a8; wherever factors can be folded",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=_INT8, activations=_INT8, scaling=_SMOOTHQUANT),
    ),
)

SMOOTHQUANT_W8A8_STATIC = Recipe(
    name="smoothquant_w8a8_static",
    source="SmoothQuant (Xiao et al. 2023, arXiv:2211.10438), level O3: activations per tensor, "
    "static; with alpha 0.6, wherever factors can be folded; inputs of down projections, which "
    "hold the largest peaks, stay dynamic",
    rules=(
        *_LEAVE_ENDS,
        Rule(
            match="*down*",
            weights=_INT8,
            activations=_INT8,
            scaling=SmoothQuant(alpha=0.6),
            optional=True,
        ),
        Rule(
            match="*",
            weights=_INT8,
            activations=Scheme(values=INT8, tile=PER_TENSOR),
            scaling=SmoothQuant(alpha=0.6),
            static=True,
        ),
    ),
)

HQQ_W4_G64 = Recipe(
    name="hqq_w4_g64",
    source="HQQ (Badri and Shaji 2023): zero points from half-quadratic optimization, scale and "
    "zero point in float16",
    rules=(
        *_LEAVE_ENDS,
        Rule(match="*", weights=_with_zeros(UINT4, FLOAT16, FLOAT16), algorithm=HQQ()),
    ),
)

NAMED: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        W8A16,
        W4A16_G64,
        W4A16_G128,
        W4A16_G64_E8,
        W8A8,
        LLM_INT8,
        FP8,
        MXFP8,
        MXFP4,
        NVFP4,
        NF4_DOUBLE,
        GPTQ_W4_SYM_G64,
        GPTQ_W4_ASYM_G64,
        GPTQ_W3_SYM_G64,
        GPTQ_W2_ASYM_G64,
        AWQ_W4_ASYM_G64,
        SMOOTHQUANT_W8A8,
        SMOOTHQUANT_W8A8_STATIC,
        HQQ_W4_G64,
        *TRAINED,
    )
}
"""Every named recipe, by its name."""


def by_name(name: str) -> Recipe:
    """The recipe called `name`, in any case.

    **Raises:** `ValueError` for an unknown name, with the nearest known one.
    """
    try:
        return NAMED[name.lower()]
    except KeyError:
        raise ValueError(
            f"There is no recipe named {name!r}; the nearest is {nearest(name.lower(), NAMED)!r} "
            f"(all: {', '.join(NAMED)}). A file's name ends in .toml."
        ) from None


def find(name_or_file: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file, if the text ends in `.toml`, else the one of that name.

    **Raises:** `ValueError` for an unknown name or a recipe that is not well formed; `OSError` if
    the file cannot be read.
    """
    text = os.fspath(name_or_file)
    return load(text) if Path(text).suffix == ".toml" else by_name(text)
