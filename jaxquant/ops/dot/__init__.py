"""`dot_general` where either side, or both, may be a QArray."""

from ._api import (
    BACKENDS as BACKENDS,
    choose_backend as choose_backend,
    dot as dot,
    dot_general as dot_general,
    KERNELS as KERNELS,
    layout_for as layout_for,
    make_call as make_call,
    preferred_backend as preferred_backend,
)
from ._call import Layer as Layer
