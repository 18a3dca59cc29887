"""`ragged_dot`, the product of rows with their experts, where either side may be a QArray."""

from ._api import BACKENDS as BACKENDS, ragged_dot as ragged_dot
