"""How Hopper's kernels are cut up, by shape: rules, with what was read off the compiler as data.

Nothing here was timed: no chip was at hand. The rules follow what the compiler reports (registers,
spills, widths of loads) and the bytes that have to be on their way at once.
"""

# An H100 SXM has so many multiprocessors, each with room for two of our blocks or more.
MULTIPROCESSORS = 132
BLOCKS = 2 * MULTIPROCESSORS
# Beyond so many rows decoding codes once for each tile of rows costs more than writing the weight
# as bfloat16 once, after which XLA's product runs at the full rate of the tensor cores.
MOST_ROWS = 256
# By bits of a code, then by rows of a tile: outputs of a block, warps, steps on their way, stages
# of activations.
WEIGHT_ONLY = {
    8: {16: (64, 4, 4, 3), 32: (128, 8, 2, 3), 64: (128, 8, 2, 3)},
    4: {16: (128, 8, 2, 3), 32: (128, 8, 1, 3), 64: (128, 8, 1, 2)},
    3: {16: (64, 4, 1, 3), 32: (64, 4, 1, 2), 64: (64, 4, 1, 2)},
    2: {16: (128, 8, 1, 3), 32: (128, 8, 1, 2), 64: (64, 4, 1, 2)},
}
# Stages of 4 bits by rows of a tile where sums are not split: with those above the compiler takes
# 130 to 143 registers then, and a multiprocessor holds one block.
STAGES_WHOLE = {64: 3}
# Where runs do not lie side by side, each has its own load of activations: of 16 bytes a thread if
# threads are few.
WEIGHT_ONLY_APART = {16: (64, 4, 2, 3), 32: (128, 8, 1, 3), 64: (128, 8, 1, 2)}
# Looking a code up takes more registers.
WEIGHT_ONLY_LOOKUP = {16: (128, 8, 2, 3), 32: (128, 8, 1, 3), 64: (128, 8, 1, 3)}
# Of larger tiles the registers do not hold scales too; by runs of codes that share a byte.
MOST_ROWS_SCALES_AHEAD = {1: 32, 2: 32, 4: 16}
# Float32 activations are three bfloat16 numbers each, and have three times the products, or six.
WEIGHT_ONLY_FLOAT32 = {
    8: {16: (64, 4, 2, 2), 32: (64, 4, 1, 2)},
    4: {16: (64, 4, 1, 2), 32: (64, 4, 1, 2)},
    3: {16: (64, 4, 1, 2)},
    2: {16: (64, 4, 1, 2)},
}
# Codes by codes XLA multiplies at the full rate by itself; kernels split the sums of few rows.
MOST_ROWS_CODES = 64
# By rows of a tile: outputs of a block, warps, stages.
INT8 = {16: (64, 4, 4), 32: (128, 4, 3), 64: (128, 4, 3)}
FP8 = {16: (128, 4, 4), 32: (64, 4, 4), 64: (64, 4, 3)}


def tile_of_rows(rows: int, table: dict[int, tuple[int, ...]]) -> int:
    """The smallest tile in `table` that holds `rows`, or the largest there is."""
    return min((size for size in table if size >= rows), default=max(table))


def even_splits(blocks: int, steps: int, ahead: int) -> int:
    """As `splits`, where each split has the same number of steps."""
    chosen = splits(blocks, steps, ahead)
    while steps % chosen:
        chosen //= 2
    return chosen


def splits(blocks: int, steps: int, ahead: int) -> int:
    """Over how many blocks the summed axis is split: a power of two that leaves each some steps.

    Blocks that nearly fill the chip are not split again: they would be two rounds of it, and each
    split writes float32 sums that are read once more.
    """
    chosen = 1
    while 8 * blocks * chosen < 7 * BLOCKS and steps // (2 * chosen) >= 2 * ahead:
        chosen *= 2
    return chosen
