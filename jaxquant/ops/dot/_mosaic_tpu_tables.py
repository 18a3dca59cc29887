"""What was found by compiling for each generation of TPU; `docs/kernels.md` has the figures."""

from ...numerics import Format
from ._call import DotCall

INTERPRETED = 5
"""The generation whose kernels are interpreted on a CPU."""

CONVERTS_FOUR_BITS = (6, 7)
"""Generations whose vector units convert 4-bit integers to bfloat16 in few instructions."""

# From `experiments/kernel_blocks/rows.py`, a weight of 4096x4096. v4 has no vector instructions for
# int8 and e4m3: of 16 rows the kernel takes 49 and 103 us where XLA's programs take 14 and 62.
_MOST_ROWS: dict[int, dict[str, int]] = {
    4: {"INT8": 0, "E4M3": 0},
    6: {"INT8": 64},
}


def most_rows(generation: int, values: Format) -> int:
    """Up to how many rows the kernel for a format is scheduled to be faster than XLA's program."""
    return _MOST_ROWS.get(generation, {}).get(values.name, 128)


MULTIPLIES_INT8 = (5, 6)
"""Generations whose matrix units multiply int8 by int8."""

MULTIPLIES_E4M3 = (7,)
"""Generations whose matrix units multiply e4m3, by itself or by bfloat16."""

MULTIPLIES_E4M3_BIAS_11 = (5, 6)
"""Generations whose matrix units take the other e4m3, of exponents biased by 11."""

_MIB = 2**20
VECTOR_MEMORY: dict[int, tuple[int, int | None]] = {
    4: (9 * _MIB, None),
    5: (36 * _MIB, 48 * _MIB),
    6: (36 * _MIB, 48 * _MIB),
    7: (36 * _MIB, 48 * _MIB),
}
"""Bytes of a core's memory: what a kernel's blocks may fill, and the limit that is set for it."""


MOST_ROWS_AT_ONCE = {4: 64, 5: 512, 6: 512, 7: 512}
"""Rows of activations in a block of codes by codes: with more of them registers spill too much."""


def generation(call: DotCall) -> int:
    """The generation that a call is compiled for."""
    return INTERPRETED if call.interpret else call.device.tpu_generation


_MOST_ROWS_OF_CODES: dict[int, dict[str, int]] = {4: {"INT8": 1, "INT4": 0, "E4M3": 0, "E5M2": 0}}
"""Generation 4 has no conversion of bytes that is fast enough, and XLA feeds int8 to its matrix
unit, which Mosaic does not; but for one row XLA multiplies without that unit."""


def most_rows_of_codes(generation: int, values: Format) -> int | None:
    """Up to how many rows products of codes are scheduled to be faster than XLA's; `None`: all."""
    return _MOST_ROWS_OF_CODES.get(generation, {}).get(values.name)
