"""The tables of formats whose codes are indices: what each code stands for."""

import numpy as np


def normal_float_4() -> tuple[float, ...]:
    """NF4: quantiles of a normal distribution, 0 among them, scaled to end at -1 and 1.

    The published numbers (QLoRA, appendix E) in float32, as every implementation holds them.
    """
    numbers = (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171229224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
    return _float32(numbers)


def bitsandbytes_fp4() -> tuple[float, ...]:
    """The 4-bit float of bitsandbytes, by code: a sign bit, and twelfths in an order of its own."""
    twelfths = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3])
    # A negative zero is written 0: both codes stand for it.
    return _float32((*(twelfths / 12), *(0.0 - twelfths / 12)))


def dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit map of bitsandbytes (`create_dynamic_map`), ascending: seven decades.

    Decade `i` is cut into `2^i` equal parts, each held by its middle; 0 and 1 are added. It is what
    PyTorch computes there, to the bit: ends of parts are counted from both sides, in float32.
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        part = float(np.float32(0.9) / np.float32(2**i))
        count = np.arange(2**i + 1)
        low, high = float(np.float32(0.1)) + part * count, 1.0 - part * (2**i - count)
        ends = np.where(count < (2**i + 1) // 2, low, high).astype(np.float32)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        values = np.float32(10.0 ** (i - 6)) * middles
        numbers += [*map(float, values), *map(float, -values)]
    return _float32(sorted(numbers))


def _float32(numbers: object) -> tuple[float, ...]:
    return tuple(float(x) for x in np.asarray(numbers, np.float32))
