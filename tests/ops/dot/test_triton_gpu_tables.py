"""How products are cut up."""

from jaxquant.ops.dot import _triton_gpu_tables as tables


def test_rows_go_to_the_smallest_tile_that_holds_them():
    table = tables.WEIGHT_ONLY[4]
    assert [tables.tile_of_rows(r, table) for r in (1, 16, 17, 64, 65, 500)] == [
        *(16, 16, 32, 64, 64, 64)
    ]


def test_few_blocks_are_split_while_each_keeps_some_steps():
    assert tables.splits(tables.BLOCKS, 1000, 2) == 1
    # 256 of 264 are not made 512, 224 are made 448.
    assert tables.splits(32, 64, 2) == 8
    assert tables.splits(28, 64, 2) == 16
    assert tables.splits(32, 8, 2) == 2
    assert tables.splits(1, 3, 2) == 1
    assert tables.splits(1, 10**6, 1) == 256


def test_even_splits_divide_the_steps():
    assert tables.splits(32, 24, 1) == 8
    assert tables.even_splits(32, 24, 1) == 8
    assert tables.even_splits(32, 25, 1) == 1
    assert 36 % tables.even_splits(32, 36, 2) == 0


def test_tiles_are_what_the_tensor_cores_take():
    by_rows = [*tables.WEIGHT_ONLY.values(), *tables.WEIGHT_ONLY_FLOAT32.values()]
    for table in (*by_rows, tables.WEIGHT_ONLY_LOOKUP, tables.WEIGHT_ONLY_APART):
        for rows, (outputs, warps, ahead, stages) in table.items():
            # Four warps make 64 outputs together, each 16 of them.
            assert outputs % (16 * warps) == 0 and warps % 4 == 0
            assert rows >= 16 and ahead >= 1 and stages >= 2
