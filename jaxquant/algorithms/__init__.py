"""Choosing codes for weights, one file a paper: weights and a scheme in, QArrays out."""

from ._awq import (
    AWQ as AWQ,
    choose as choose,
    Duo as Duo,
    Found as Found,
    rounded_at as rounded_at,
    scaling_losses as scaling_losses,
    search as search,
)
from ._clip_search import clipped as clipped, ClipSearch as ClipSearch
from ._gptq import GPTQ as GPTQ, gptq as gptq, gram_losses as gram_losses, Order as Order
from ._hqq import HQQ as HQQ
from ._matrix import (
    as_matrix as as_matrix,
    assemble as assemble,
    Chosen as Chosen,
    from_matrix as from_matrix,
    matrix_tile as matrix_tile,
)
from ._nearest import nearest as nearest, quantize as quantize
from ._smoothquant import smoothed_losses as smoothed_losses, SmoothQuant as SmoothQuant
