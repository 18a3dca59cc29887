"""`conv_general_dilated` where either side, or both, may be a QArray."""

from ._api import BACKENDS as BACKENDS, conv_general_dilated as conv_general_dilated
