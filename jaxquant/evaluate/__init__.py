"""How good a model still is, and how fast: scores on tokens, errors of weights, timings."""

from ._score import (
    checked_windows as checked_windows,
    Evaluation as Evaluation,
    score as score,
    score_all as score_all,
)
from ._timing import medians as medians, Timing as Timing
from ._tokens import read_tokens as read_tokens, windows_of_text as windows_of_text
