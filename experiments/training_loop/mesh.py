"""Where arrays lie: a batch split over all devices, weights over some of them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .settings import Devices

DATA, FSDP = "data", "fsdp"
SMALLEST = 1 << 12
"""Values of an array that is split: of a smaller one, every device has the whole."""


def make_mesh(devices: Devices) -> Mesh:
    """The mesh `[data, fsdp]`.

    **Raises:** `ValueError` if there are not that many devices.
    """
    wanted, here = devices.data * devices.fsdp, jax.devices()
    if len(here) < wanted:
        raise ValueError(
            f"The settings want {wanted} devices and {len(here)} are here. On a CPU, set "
            f"jax_num_cpu_devices={wanted} before JAX starts; otherwise lower devices.data."
        )
    grid = np.array(here[:wanted]).reshape(devices.data, devices.fsdp)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """FSDP (ZeRO-3, Rajbhandari et al. 2020): the longest axis that `fsdp` divides, the last of
    equals, is split over it."""
    parts = mesh.shape[FSDP]
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting or np.prod(shape) < SMALLEST:
        return PartitionSpec()
    _, axis = max(fitting)
    return PartitionSpec(*[None] * axis, FSDP)


def placed(tree: Any, mesh: Mesh) -> Any:
    """For each array of a state (or its `ShapeDtypeStruct`), how it lies on the mesh."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x.shape, mesh)), tree)


def of_parts(mesh: Mesh) -> NamedSharding:
    """How parts of a batch `[accumulation, part, ...]` lie: examples over all devices."""
    return NamedSharding(mesh, PartitionSpec(None, (DATA, FSDP)))
