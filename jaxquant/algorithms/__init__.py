"""Choosing codes for weights, one file a paper: weights and a scheme in, QArrays out."""

from ._awq import (
    AWQ as AWQ,
    choose as choose,
    Duo as Duo,
    Found as Found,
    rounded_at as rounded_at,
    scaling_losses as scaling_losses,
)
from ._clip_search import clipped as clipped, ClipSearch as ClipSearch
from ._fold_apply import (
    apply_folds as apply_folds,
    root_factors as root_factors,
    ScaledArray as ScaledArray,
)
from ._gptq import GPTQ as GPTQ, gptq as gptq, gram_losses as gram_losses, Order as Order
from ._hqq import HQQ as HQQ
from ._llm_int8 import known_outliers as known_outliers
from ._matrix import (
    as_matrix as as_matrix,
    assemble as assemble,
    Chosen as Chosen,
    from_matrix as from_matrix,
    held_values as held_values,
    matrix_tile as matrix_tile,
)
from ._nearest import nearest as nearest, quantize as quantize
from ._range_search import RangeSearch as RangeSearch
from ._smoothquant import smoothed_losses as smoothed_losses, SmoothQuant as SmoothQuant
from ._static import static_observers as static_observers, static_scale as static_scale
