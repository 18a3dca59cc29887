"""Choosing codes for weights. One file a paper; weights, statistics and a scheme in, QArrays out."""

from ._nearest import nearest as nearest, quantize as quantize
