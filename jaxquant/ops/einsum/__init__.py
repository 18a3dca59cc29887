"""`einsum` of operands any of which may be QArrays."""

from ._api import einsum as einsum
