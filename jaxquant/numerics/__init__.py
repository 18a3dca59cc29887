"""What a code stands for: formats, rounding, ranges, packing. No tiles, no models."""

from . import formats as formats, ranges as ranges
from ._bytes import as_bytes as as_bytes, from_bytes as from_bytes, is_narrow as is_narrow
from ._cast import (
    decode as decode,
    encode as encode,
    round_at_random as round_at_random,
)
from ._pack import (
    least_block as least_block,
    pack as pack,
    packed_size as packed_size,
    unpack as unpack,
)
from ._scale import peak as peak
from .formats import (
    BFLOAT16 as BFLOAT16,
    BINARY as BINARY,
    DYNAMIC8 as DYNAMIC8,
    E2M1 as E2M1,
    E2M3 as E2M3,
    E3M2 as E3M2,
    E4M3 as E4M3,
    E5M2 as E5M2,
    E8M0 as E8M0,
    FLOAT16 as FLOAT16,
    FLOAT32 as FLOAT32,
    Format as Format,
    format_named as format_named,
    FORMATS as FORMATS,
    FP4 as FP4,
    INT1 as INT1,
    INT2 as INT2,
    INT3 as INT3,
    INT4 as INT4,
    INT5 as INT5,
    INT6 as INT6,
    INT7 as INT7,
    INT8 as INT8,
    NF4 as NF4,
    TERNARY as TERNARY,
    UINT1 as UINT1,
    UINT2 as UINT2,
    UINT3 as UINT3,
    UINT4 as UINT4,
    UINT5 as UINT5,
    UINT6 as UINT6,
    UINT7 as UINT7,
    UINT8 as UINT8,
)
from .ranges import (
    AbsMax as AbsMax,
    AbsMean as AbsMean,
    check_range as check_range,
    Convention as Convention,
    ExponentRule as ExponentRule,
    Fixed as Fixed,
    MeanSquaredError as MeanSquaredError,
    MinMax as MinMax,
    Percentile as Percentile,
    Range as Range,
    RootMeanSquare as RootMeanSquare,
    SharedExponent as SharedExponent,
)
