"""The tables speak of every generation, and of each format that a kernel reads."""

import pytest

from jaxquant.numerics import E4M3, INT4, INT8, NF4
from jaxquant.ops.dot import _mosaic_tpu_tables as tables


@pytest.mark.parametrize("values", [INT4, INT8, E4M3, NF4], ids=str)
@pytest.mark.parametrize("generation", [4, 5, 6, 7])
def test_the_kernel_wins_up_to_some_number_of_rows_or_never(generation: int, values):
    assert 0 <= tables.most_rows(generation, values) <= 1024
