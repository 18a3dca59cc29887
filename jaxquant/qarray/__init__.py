"""How an array is held in few bits: schemes, QArrays, and the ways to make and take them apart."""

from . import schemes as schemes
from ._error import weight_error as weight_error, WeightError as WeightError
from ._layout import CANONICAL as CANONICAL, Layout as Layout
from ._qarray import (
    bytes_held as bytes_held,
    check_qarray as check_qarray,
    dequantize as dequantize,
    in_memory as in_memory,
    is_qarray as is_qarray,
    QArray as QArray,
)
from ._quantize import (
    abstract_qarray as abstract_qarray,
    quantize_array as quantize_array,
)
from ._relayout import relayout as relayout
from ._reshape import (
    astype as astype,
    dynamic_index as dynamic_index,
    reshape as reshape,
    retile as retile,
    slice_axis as slice_axis,
    slice_qarray as slice_qarray,
    transpose as transpose,
)
from ._scheme import (
    PER_CHANNEL as PER_CHANNEL,
    PER_TENSOR as PER_TENSOR,
    Scheme as Scheme,
    Tile as Tile,
    tile_shape as tile_shape,
)
from ._sharding import (
    constrain as constrain,
    leaf_specs as leaf_specs,
    place as place,
    shardings_like as shardings_like,
)
