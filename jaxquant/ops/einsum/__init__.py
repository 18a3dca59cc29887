"""`einsum` of two operands, either of which may be a QArray."""

from ._api import einsum as einsum
