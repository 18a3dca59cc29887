"""Choosing codes for weights, one file a paper: weights and a scheme in, QArrays out."""

from ._nearest import nearest as nearest, quantize as quantize
