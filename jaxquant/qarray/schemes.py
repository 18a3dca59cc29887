"""Named schemes: published ways to hold an array, as values. See docs/schemes.md."""

from ..numerics import (
    AbsMax,
    AbsMean,
    BINARY as BINARY_CODES,
    Convention,
    DYNAMIC8,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    Format,
    FP4 as FP4_CODES,
    INT4,
    INT8,
    NF4 as NF4_CODES,
    SharedExponent,
    TERNARY as TERNARY_CODES,
)
from ._scheme import PER_CHANNEL, PER_TENSOR, Scheme, Tile

INT8_CHANNEL = Scheme(values=INT8, tile=PER_CHANNEL)
"""int8, one scale a channel, `peak / 127`: LLM.int8() (arXiv:2208.07339), SmoothQuant."""
INT4_G64 = Scheme(values=INT4, tile=Tile(contracted=64), range=AbsMax(convention=Convention.MIDDLE))
"""int4 in groups of 64, `peak / 7.5`: GPTQ (arXiv:2210.17323) and compressed-tensors."""
E4M3_BLOCK = Scheme(values=E4M3, tile=Tile(contracted=128, kept=128, ragged=True))
"""fp8 in blocks of 128 x 128, as the weights of DeepSeek-V3 (arXiv:2412.19437, section 3.3.2)."""


def _mx(values: Format) -> Scheme:
    return Scheme(values=values, tile=Tile(contracted=32), scale=E8M0, range=SharedExponent())


MXFP8_E4M3 = _mx(E4M3)
"""OCP MX v1.0, table 1: blocks of 32 that share an exponent, by the rule of section 6.3."""
MXFP8_E5M2 = _mx(E5M2)
MXFP6_E3M2 = _mx(E3M2)
MXFP6_E2M3 = _mx(E2M3)
MXFP4 = _mx(E2M1)

NVFP4 = Scheme(values=E2M1, tile=Tile(contracted=16), scale=Scheme(values=E4M3, tile=PER_TENSOR))
"""NVIDIA's: blocks of 16, scales in e4m3 relative to one float32 scale a tensor, which is
`peak / (6 * 448)` (Pretraining LLMs with NVFP4, arXiv:2509.25149, section 2)."""

NF4 = Scheme(values=NF4_CODES, tile=Tile(contracted=64))
"""QLoRA (arXiv:2305.14314), section 3, with blocks of 64 and float32 scales: 4.5 bits a value."""
NF4_DOUBLE = Scheme(
    values=NF4_CODES,
    tile=Tile(contracted=64),
    scale=Scheme(values=DYNAMIC8, tile=Tile(contracted=None, kept=32, ragged=True), centered=True),
    codes_first=True,
)
"""NF4 with double quantization: scales, less their mean, in 8 bits; one float32 for 32 channels.

bitsandbytes gives one float32 to 256 scales of the flattened array; our tiles are boxes, so that
slices and shards of an array can be had. `checkpoint` reads and writes its bytes.
"""
FP4 = Scheme(values=FP4_CODES, tile=Tile(contracted=64))
"""The 4-bit float of bitsandbytes, in blocks of 64."""

TERNARY = Scheme(values=TERNARY_CODES, tile=PER_TENSOR, range=AbsMean())
"""-1, 0 and 1 times an array's mean magnitude: BitNet b1.58 (arXiv:2402.17764), eq. 1 to 3."""
BINARY = Scheme(values=BINARY_CODES, tile=PER_CHANNEL, range=AbsMean())
"""Signs times the mean magnitude of each channel: XNOR-Net (arXiv:1603.05279), section 3.1."""

NAMED: dict[str, Scheme] = {
    "int8_channel": INT8_CHANNEL,
    "int4_g64": INT4_G64,
    "e4m3_block": E4M3_BLOCK,
    "mxfp8_e4m3": MXFP8_E4M3,
    "mxfp8_e5m2": MXFP8_E5M2,
    "mxfp6_e3m2": MXFP6_E3M2,
    "mxfp6_e2m3": MXFP6_E2M3,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "nf4": NF4,
    "nf4_double": NF4_DOUBLE,
    "fp4": FP4,
    "ternary": TERNARY,
    "binary": BINARY,
}
"""Every named scheme, by its name."""
