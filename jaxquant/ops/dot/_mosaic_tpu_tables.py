"""What was found by compiling for each generation of TPU; `docs/kernels.md` has the figures."""

from ...numerics import Format

INTERPRETED = 5
"""The generation whose kernels are interpreted on a CPU."""

CONVERTS_FOUR_BITS = (6, 7)
"""Generations whose vector units convert 4-bit integers to bfloat16 in few instructions."""

_MOST_ROWS: dict[int, dict[str, int]] = {}


def most_rows(generation: int, values: Format) -> int:
    """Up to how many rows the kernel for a format is scheduled to be faster than XLA's program."""
    return _MOST_ROWS.get(generation, {}).get(values.name, 128)
