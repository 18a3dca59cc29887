"""Choosing codes for weights, one file a paper: weights and a scheme in, QArrays out."""

from ._gptq import GPTQ as GPTQ, gptq as gptq, gram_losses as gram_losses, Order as Order
from ._matrix import (
    as_matrix as as_matrix,
    assemble as assemble,
    Chosen as Chosen,
    from_matrix as from_matrix,
    matrix_tile as matrix_tile,
)
from ._nearest import nearest as nearest, quantize as quantize
