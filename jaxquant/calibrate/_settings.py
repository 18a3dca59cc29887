"""How a calibration runs, whatever is done to the sites."""

import dataclasses
import enum
from typing import Any

import jax.numpy as jnp


class Inputs(enum.Enum):
    """What sites see while those after them are calibrated.

    `QUANTIZED`: what the weights that are chosen already make of the data, as GPTQ does; later
    layers make up for the errors of earlier ones. `FLOAT`: what the float model makes of it.
    """

    QUANTIZED = "quantized"
    FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a calibration runs; none of these says what is done to a site.

    `memory` bounds the bytes of activations held in memory; more of them go to files. `narrow` is
    a dtype in which sites multiply while calibrating, with sums in float32 (`None`: as the model
    does). Experts that saw fewer rows than `least_share` of what an expert saw on average are
    rounded to nearest. `unit` is how many windows, the leading axis of a batch's arrays, a device
    runs at once: then codes are the same to the bit on any number of devices (`None`: batches as
    they come). `sample` is on how many batches, or units, scalings compare the outputs of a block.
    The data themselves are held beside `memory`.
    """

    inputs: Inputs = Inputs.QUANTIZED
    memory: int = 4 << 30
    narrow: Any = None
    least_share: float = 0.05
    unit: int | None = None
    sample: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Inputs):
            raise ValueError(f"inputs={self.inputs!r} is not one of {[str(i) for i in Inputs]}.")
        if self.narrow is not None and not jnp.issubdtype(self.narrow, jnp.floating):
            raise ValueError(f"narrow={self.narrow!r} is no dtype of floats. Give jnp.bfloat16.")
        if not 0 <= self.least_share <= 1:
            raise ValueError(f"least_share={self.least_share} is not between 0 and 1.")
        for name, least in (("memory", 0), ("sample", 1), ("unit", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} is below {least}.")
