"""Products whose outlier columns are kept in floats: LLM.int8()."""

from ._values import Outliers as Outliers, OutlierWeights as OutlierWeights
