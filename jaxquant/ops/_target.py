"""Which device a trace is for."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A platform (`cpu`, `tpu`, `cuda`) and the kind of chip, by JAX's names.

    `cores` is how many of a TPU's cores make one device.
    """

    platform: str
    kind: str
    cores: int = 1

    @property
    def tpu_generation(self) -> int:
        """4, 5, 6 or 7.

        **Raises:** `ValueError` for a chip that is not known.
        """
        if self.kind not in _TPU_GENERATIONS:
            known = ", ".join(sorted(set(_TPU_GENERATIONS)))
            raise ValueError(f"{self.kind!r} is no known kind of TPU; known are {known}.")
        return _TPU_GENERATIONS[self.kind]


# As `jax.Device.device_kind` spells them.
_TPU_GENERATIONS = {
    "TPU v4": 4,
    "TPU v5 lite": 5,
    "TPU v5e": 5,
    "TPU v5": 5,
    "TPU v5p": 5,
    "TPU v6 lite": 6,
    "TPU v6e": 6,
    "TPU7x": 7,
}


def target_device() -> Device:
    """The device that what is traced now will be compiled for.

    That of the mesh in force (`jax.set_mesh`), which is also part of what `jit` caches by; else the
    one that JAX runs on. So a program may be traced here for a chip that is elsewhere.
    """
    there = jax.sharding.get_abstract_mesh().abstract_device
    if there is not None:
        return Device(
            platform=_platform(there.platform), kind=there.device_kind, cores=there.num_cores or 1
        )
    # `jax.default_device` may name a platform or a device.
    chosen: Any = getattr(jax.config, "jax_default_device")  # noqa: B009
    here = chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
    return Device(
        platform=_platform(here.platform),
        kind=here.device_kind,
        cores=getattr(here, "num_cores", None) or 1,
    )


def _platform(name: str) -> str:
    return "cuda" if name == "gpu" else name
