"""Formats: which values one code can stand for. Each is one row of `FORMATS`: `jq.formats.NF4`."""

import dataclasses

import ml_dtypes
import numpy as np

from ._tables import bitsandbytes_fp4, dynamic_map, normal_float_4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The values that one code can stand for.

    A code is an integer (`integer`), the bits of a small float (of `mantissa` bits after the point,
    its smallest normal number `2 ** least_exponent`), or an index into a `table` of values.
    `storage` is the dtype that holds one code an element, `bits` what one code costs once packed.
    Where a dtype of just so many bits exists and XLA computes with it soundly, that is the storage;
    it does not for `int2`: XLA's CPU compiler ends the process at a concatenation.
    """

    name: str
    bits: int
    storage: np.dtype
    lowest: float
    highest: float
    source: str
    integer: bool = False
    mantissa: int | None = None
    least_exponent: int = 0
    table: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def packs(self) -> bool:
        """Whether several codes share a byte, so that packing saves memory."""
        return self.bits < 8

    @property
    def signed(self) -> bool:
        """Whether codes are two's complement, so that unpacking extends a sign."""
        return self.integer and self.lowest < 0

    @property
    def native(self) -> bool:
        """Whether casting to `storage` and back rounds, so that the hardware may do it."""
        return self.mantissa is not None and self.storage.kind != "u"

    @property
    def has_zero(self) -> bool:
        """Whether a code stands for 0."""
        return self.table is None or 0.0 in self.table

    @property
    def power_of_two(self) -> bool:
        """Whether every value is a power of two, as of scales that are exponents alone."""
        return self.lowest > 0

    def exact_in(self, dtype: np.dtype) -> bool:
        """Whether every value of this format is one of the floating-point `dtype`."""
        info = ml_dtypes.finfo(dtype)
        if self.table is not None:
            return all(float(np.asarray(v).astype(dtype)) == v for v in self.table)
        if self.integer:
            return max(-self.lowest, self.highest) <= 2.0 ** (info.nmant + 1)
        if self.mantissa is None:
            return False
        return self.mantissa <= info.nmant and (
            self.highest <= float(info.max) and self.least_exponent >= int(info.minexp)
        )

    def __repr__(self) -> str:
        return self.name


def _integer(bits: int, storage: type, *, signed: bool) -> Format:
    return Format(
        name=f"INT{bits}" if signed else f"UINT{bits}",
        bits=bits,
        storage=np.dtype(storage),
        lowest=-(2.0 ** (bits - 1)) if signed else 0.0,
        highest=2.0 ** (bits - 1) - 1.0 if signed else 2.0**bits - 1.0,
        integer=True,
        source="two's complement" if signed else "binary",
    )


def _float(name: str, dtype: type, source: str, *, storage: type | None = None) -> Format:
    info = ml_dtypes.finfo(dtype)
    return Format(
        name=name,
        bits=info.bits,
        storage=np.dtype(storage or dtype),
        lowest=float(info.min),
        highest=float(info.max),
        mantissa=int(info.nmant),
        least_exponent=int(info.minexp),
        source=source,
    )


def _table(name: str, bits: int, storage: type, table: tuple[float, ...], source: str) -> Format:
    return Format(
        name=name,
        bits=bits,
        storage=np.dtype(storage),
        lowest=min(table),
        highest=max(table),
        table=table,
        source=source,
    )


INT1, INT2, INT3, INT5, INT6, INT7, INT8 = (
    _integer(bits, np.int8, signed=True) for bits in (1, 2, 3, 5, 6, 7, 8)
)
INT4 = _integer(4, ml_dtypes.int4, signed=True)
UINT1, UINT2, UINT3, UINT5, UINT6, UINT7, UINT8 = (
    _integer(bits, np.uint8, signed=False) for bits in (1, 2, 3, 5, 6, 7, 8)
)
UINT4 = _integer(4, ml_dtypes.uint4, signed=False)
TERNARY = Format(
    name="TERNARY",
    bits=2,
    storage=np.dtype(np.int8),
    lowest=-1.0,
    highest=1.0,
    integer=True,
    source="-1, 0, 1: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), section 2; two bits a code",
)
E4M3 = _float("E4M3", ml_dtypes.float8_e4m3fn, "OCP OFP8 v1.0, section 5: no infinities")
E5M2 = _float("E5M2", ml_dtypes.float8_e5m2, "OCP OFP8 v1.0, section 5")
E3M2 = _float("E3M2", ml_dtypes.float6_e3m2fn, "OCP MX v1.0, section 5.3.2", storage=np.uint8)
E2M3 = _float("E2M3", ml_dtypes.float6_e2m3fn, "OCP MX v1.0, section 5.3.2", storage=np.uint8)
E2M1 = _float("E2M1", ml_dtypes.float4_e2m1fn, "OCP MX v1.0, section 5.3.3")
E8M0 = Format(
    name="E8M0",
    bits=8,
    storage=np.dtype(ml_dtypes.float8_e8m0fnu),
    # The format has 2^-127 too; float32 holds that only as a subnormal number, which XLA flushes.
    lowest=2.0**-126,
    highest=2.0**126,
    source="OCP MX v1.0, section 5.4.1: an exponent alone; for scales",
)
NF4 = _table(
    "NF4",
    4,
    ml_dtypes.uint4,
    normal_float_4(),
    "QLoRA (Dettmers et al. 2023, arXiv:2305.14314), appendix E",
)
FP4 = _table(
    "FP4", 4, ml_dtypes.uint4, bitsandbytes_fp4(), "bitsandbytes `fp4`; not the E2M1 of OCP MX"
)
DYNAMIC8 = _table(
    "DYNAMIC8",
    8,
    np.uint8,
    dynamic_map(),
    "8-bit Approximations for Parallelism in Deep Learning (Dettmers 2015, arXiv:1511.04561), as "
    "bitsandbytes holds the scales of NF4",
)
BINARY = _table("BINARY", 1, np.uint8, (1.0, -1.0), "XNOR-Net (Rastegari et al. 2016): the sign")
FLOAT16 = _float("FLOAT16", np.float16, "IEEE 754-2019 binary16")
BFLOAT16 = _float("BFLOAT16", ml_dtypes.bfloat16, "the upper half of binary32")
FLOAT32 = _float("FLOAT32", np.float32, "IEEE 754-2019 binary32")

_ROWS = (
    *(INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8),
    *(UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8),
    *(E4M3, E5M2, E3M2, E2M3, E2M1, E8M0),
    *(NF4, FP4, DYNAMIC8, TERNARY, BINARY),
    *(FLOAT16, BFLOAT16, FLOAT32),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}


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
