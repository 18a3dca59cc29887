"""Products whose outlier columns are kept in floats: LLM.int8()."""

from ._api import BACKENDS as BACKENDS, dot_with_outliers as dot_with_outliers
from ._values import Outliers as Outliers, OutlierWeights as OutlierWeights
