"""Computing with QArrays. One folder an op; in each, `_reference` is the definition."""

from ._activations import (
    quantize_activation as quantize_activation,
    quantize_static as quantize_static,
)
from ._dispatch import Refusal as Refusal
from .conv import conv_general_dilated as conv_general_dilated
from .dot import (
    BACKENDS as BACKENDS,
    choose_backend as choose_backend,
    dot as dot,
    dot_general as dot_general,
    preferred_backend as preferred_backend,
)
from .einsum import einsum as einsum
from .outliers import (
    dot_with_outliers as dot_with_outliers,
    Outliers as Outliers,
    OutlierWeights as OutlierWeights,
)
from .ragged_dot import ragged_dot as ragged_dot
from .take import gather as gather, take as take
