"""The driver of calibrated quantization: a model block by block, in bounded memory, resumable."""

from ._batches import token_batches as token_batches
from ._driver import CalibratedSite as CalibratedSite
from ._front import calibrate as calibrate, Calibrated as Calibrated
from ._settings import Inputs as Inputs, Settings as Settings
