"""In which blocks a kernel for TPU reads a weight.

A large block is decoded in one long straight schedule, which keeps the units busy; a small one is
there sooner, and the first is waited for. About a megabyte of codes lies between the two.
"""

import math

from ._mosaic_tpu_weight import Blocks, Weight

_CODE_BYTES = 2**20
_LONGEST = 6144
_SHORTEST = 1024
_WIDEST = 1024
_NARROWEST = 256
_MOST_ROWS = 128
# Activations that are kept for all tiles of columns: a quarter of what v4 has for everything.
_KEPT_BYTES = 2**22
# Where no part of a weight along `k` is of a good size, it is taken whole, if a block of the
# narrowest columns has no more bytes than this.
_WHOLE_BYTES = 2**22
# Where there is more to a column than reading it, twice as wide a block is scheduled 5% shorter
# (experiments/kernel_blocks/run.py); its first is waited for twice as long, which wants many.
_FEW_ROWS = 32
_MANY_COLUMNS = 8192
# Wider than this, the sums of a step no longer fit in registers.
_COLUMNS = 512


def blocks_for(rows: int, weight: Weight, bits: int, cores: int = 1) -> Blocks | str:
    """The blocks for a product, or why there are none."""
    unit = _unit(weight)
    if unit is None:
        return (
            f"groups of {weight.group} along {weight.k} do not fill units of "
            f"{weight.decoder.least_unit} or more"
        )
    k = _length(weight, unit, bits)
    if k is None:
        return f"no blocks along {weight.k} hold whole groups of {weight.group}"
    n = _width(weight, k, bits)
    if bits <= 4 and rows > _FEW_ROWS and weight.n >= _MANY_COLUMNS:
        n = max(n, _WIDEST)
    return Blocks(
        rows=_rows(rows, weight.k, k),
        k=k,
        n=n,
        unit=unit,
        columns=_columns(weight, n),
        cores=cores if -(-weight.n // n) % cores == 0 else 1,
    )


def _rows(rows: int, whole: int, k: int) -> int:
    """How many rows to take at a time: where there are several steps along `k`, all are kept."""
    # A step that is longer than usual leaves room for half as many.
    most = _MOST_ROWS if k <= _LONGEST else _MOST_ROWS // 2
    while whole > k and 2 * most * whole > _KEPT_BYTES:
        most //= 2
    return min(rows, most)


def _unit(weight: Weight) -> int | None:
    """How many rows to multiply at a time: the depth of a matrix unit where that fits."""
    least = weight.decoder.least_unit
    for unit in (128, *range(256, 0, -least)):
        fits = unit % weight.group == 0 or weight.group % unit == 0 or weight.group == weight.k
        if weight.k % unit == 0 and unit % least == 0 and fits:
            return unit
    return None


def _length(weight: Weight, unit: int, bits: int) -> int | None:
    """The longest good divisor of `k` that holds whole groups and units."""
    if weight.k <= _LONGEST:
        return weight.k
    step = math.lcm(unit, weight.register_groups * weight.group)
    if weight.group == weight.k:
        step = unit
    columns = min(max(_NARROWEST, weight.decoder.least_columns), weight.n)
    whole = weight.k * columns * bits / 8 <= _WHOLE_BYTES
    if weight.k % step:
        return weight.k if whole else None
    fitting = [d for d in range(step, _LONGEST + 1, step) if weight.k % d == 0]
    best = max(fitting, default=step)
    return weight.k if best < _SHORTEST and whole else best


def _width(weight: Weight, k: int, bits: int) -> int:
    n = 2 ** round(math.log2(_CODE_BYTES * 8 / (k * bits)))
    n = max(min(n, _WIDEST), _NARROWEST, weight.decoder.least_columns)
    return weight.n if weight.n <= n else n


def _columns(weight: Weight, n: int) -> int:
    """How many columns of a block to multiply at a time."""
    whole = n % _COLUMNS == 0 and _COLUMNS % weight.decoder.least_columns == 0
    return _COLUMNS if whole else n
