"""What a code stands for: formats, rounding, ranges, packing. No tiles, no models."""

from ._cast import decode as decode, encode as encode
from ._format import (
    BFLOAT16 as BFLOAT16,
    E4M3 as E4M3,
    E5M2 as E5M2,
    FLOAT16 as FLOAT16,
    FLOAT32 as FLOAT32,
    Format as Format,
    format_named as format_named,
    FORMATS as FORMATS,
    INT4 as INT4,
    INT8 as INT8,
)
from ._pack import pack as pack, unpack as unpack
from ._range import (
    AbsMax as AbsMax,
    Convention as Convention,
    MinMax as MinMax,
    peak as peak,
    Range as Range,
)
