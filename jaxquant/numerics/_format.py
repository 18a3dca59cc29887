"""Formats: which values one code can stand for. Each format is one row of `FORMATS`."""

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The values that one code can stand for.

    `storage` is the dtype that holds one code an element; its own byte layout is that of
    `ml_dtypes`. `bits` is what one code costs once packed.
    """

    name: str
    bits: int
    storage: np.dtype
    lowest: float
    highest: float
    integer: bool
    source: str

    @property
    def packs(self) -> bool:
        """Whether several codes share a byte, so that packing saves memory."""
        return self.bits < 8

    def __repr__(self) -> str:
        return self.name


def _integer(bits: int, storage: type, source: str) -> Format:
    return Format(
        name=f"INT{bits}",
        bits=bits,
        storage=np.dtype(storage),
        lowest=-(2.0 ** (bits - 1)),
        highest=2.0 ** (bits - 1) - 1.0,
        integer=True,
        source=source,
    )


def _float(name: str, storage: type, source: str) -> Format:
    info = ml_dtypes.finfo(storage)
    return Format(
        name=name,
        bits=info.bits,
        storage=np.dtype(storage),
        lowest=float(info.min),
        highest=float(info.max),
        integer=False,
        source=source,
    )


INT8 = _integer(8, np.int8, "two's complement")
INT4 = _integer(4, ml_dtypes.int4, "two's complement; ml_dtypes.int4")
E4M3 = _float("E4M3", ml_dtypes.float8_e4m3fn, "OCP OFP8 v1.0, section 5: no infinities")
E5M2 = _float("E5M2", ml_dtypes.float8_e5m2, "OCP OFP8 v1.0, section 5")
FLOAT16 = _float("FLOAT16", np.float16, "IEEE 754-2019 binary16")
BFLOAT16 = _float("BFLOAT16", ml_dtypes.bfloat16, "the upper half of binary32")
FLOAT32 = _float("FLOAT32", np.float32, "IEEE 754-2019 binary32")

FORMATS: dict[str, Format] = {
    row.name: row for row in (INT8, INT4, E4M3, E5M2, FLOAT16, BFLOAT16, FLOAT32)
}


def format_named(name: str) -> Format:
    """The format called `name` (any case).

    **Raises:** `ValueError` for an unknown name, listing the known ones.
    """
    try:
        return FORMATS[name.upper()]
    except KeyError:
        raise ValueError(
            f"There is no format named {name!r}. Known formats: {', '.join(FORMATS)}."
        ) from None
