"""Chips as data: what a compiled program is held against. Every figure names its source.

Sources, by the letters used in the tables:

- **jax**: `TpuInfo` in `jax/_src/pallas/mosaic/tpu_info.py` of jax 0.10.2 (per core there; per
  device here). Also `tpu.get_tpu_info` in Pallas.
- **cloud**: the "System architecture" pages of Google Cloud TPU (v4, v5e, v5p, v6e, TPU7x).
- **peak**: a clock that makes the published peak: bf16 peak = 2 * n^2 * units * clock, for `units`
  matrix units of n x n multipliers. v4: 275e12 = 2 * 128^2 * 8 * 1.05e9. v5e: 197e12 = 2 * 128^2 *
  4 * 1.5e9. v5p: 459e12 = 2 * 128^2 * 8 * 1.75e9. v6e has two units of 256 x 256 (jax), whose
  918e12 would need 3.5 GHz: we take 1.75 GHz and two results a cycle from each (the schedule shows
  that units accept twice as many rows a bundle as v5e's). 7x in the same way, of 2,307e12 a chip:
  2.2 GHz. No page states these clocks.
- **h100**: NVIDIA H100 SXM5 datasheet and "NVIDIA H100 Tensor Core GPU Architecture" (dense rates,
  boost clock), and the CUDA C++ Programming Guide, table "Technical Specifications per Compute
  Capability", for 9.0.

A *device* is what JAX calls one: a v4 or v5p chip (two cores, a `parallel` grid dimension is split
over them), a v5e or v6e chip (one core), half a TPU7x chip (one core), one GPU.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """One streaming multiprocessor of a GPU, and the rules by which blocks share it."""

    registers: int
    shared_bytes: int
    """Shared memory that blocks can have, in all, what the system reserves included."""
    shared_bytes_a_block: int
    reserved_bytes_a_block: int
    """Shared memory that the system takes for itself in each block."""
    threads: int
    blocks: int
    warp: int = 32
    register_unit: int = 256
    """Registers are given to a warp in multiples of this many."""
    shared_unit: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device. Rates and sizes are those of one JAX device.

    `matrix_ops` holds operations a second (a multiply-add is two) by the name of the operands'
    type; a type that is missing has no rate of its own and runs as a wider one.
    """

    name: str
    platform: str
    """The platform that compiles for it, as JAX names it: `tpu` or `cuda`."""
    device_kind: str
    topology: str
    """How the compiler spells a slice: a format with `shape`."""
    smallest: tuple[int, ...]
    """The smallest slice that the compiler knows; one device is the first of these."""
    devices_a_chip: int
    cores: int
    clock_hz: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    matrix_ops: Mapping[str, float]
    vmem_bytes: int | None = None
    """Vector memory of one core (TPU)."""
    multiprocessors: int | None = None
    multiprocessor: Multiprocessor | None = None
    sources: Mapping[str, str]

    def devices(self, shape: tuple[int, ...]) -> int:
        """How many JAX devices a slice of this shape has; `()` is one device."""
        return math.prod(shape) * self.devices_a_chip if shape else 1


def _map(**entries):
    return MappingProxyType(entries)


_CLOUD_AND_PEAK = _map(hbm="cloud", matrix_ops="cloud", vmem="jax", clock="peak")

V4 = Target(
    name="v4",
    platform="tpu",
    device_kind="TPU v4",
    topology="v4:{shape}",
    smallest=(2, 2, 1),
    devices_a_chip=1,
    cores=2,
    clock_hz=1.05e9,
    hbm_bytes=32 << 30,
    hbm_bytes_per_second=1228e9,
    matrix_ops=_map(bf16=275e12, int8=275e12),
    vmem_bytes=16 << 20,
    sources=_CLOUD_AND_PEAK,
)
V5E = Target(
    name="v5e",
    platform="tpu",
    device_kind="TPU v5 lite",
    topology="v5e:{shape}",
    smallest=(2, 2),
    devices_a_chip=1,
    cores=1,
    clock_hz=1.5e9,
    hbm_bytes=16 << 30,
    hbm_bytes_per_second=819e9,
    matrix_ops=_map(bf16=197e12, int8=394e12, int4=788e12),
    vmem_bytes=128 << 20,
    sources=_map(hbm="cloud", matrix_ops="cloud; int4: jax", vmem="jax", clock="peak"),
)
V5P = Target(
    name="v5p",
    platform="tpu",
    device_kind="TPU v5",
    topology="v5p:{shape}",
    smallest=(2, 2, 1),
    devices_a_chip=1,
    cores=2,
    clock_hz=1.75e9,
    hbm_bytes=95 << 30,
    hbm_bytes_per_second=2765e9,
    matrix_ops=_map(bf16=459e12, int8=918e12, int4=1836e12),
    vmem_bytes=64 << 20,
    sources=_map(hbm="cloud", matrix_ops="cloud; int4: jax", vmem="jax", clock="peak"),
)
V6E = Target(
    name="v6e",
    platform="tpu",
    device_kind="TPU v6 lite",
    topology="v6e:{shape}",
    smallest=(2, 2),
    devices_a_chip=1,
    cores=1,
    clock_hz=1.75e9,
    hbm_bytes=32 << 30,
    hbm_bytes_per_second=1638e9,
    matrix_ops=_map(bf16=918e12, int8=1836e12, fp8=918e12, int4=3672e12),
    vmem_bytes=128 << 20,
    sources=_map(hbm="cloud", matrix_ops="cloud; fp8, int4: jax", vmem="jax", clock="peak"),
)
TPU7X = Target(
    name="7x",
    platform="tpu",
    device_kind="TPU7x",
    topology="tpu7x:{shape}",
    smallest=(2, 2, 1),
    devices_a_chip=2,
    cores=1,
    clock_hz=2.2e9,
    hbm_bytes=96 << 30,
    hbm_bytes_per_second=7370e9 / 2,
    matrix_ops=_map(bf16=2307e12 / 2, fp8=4614e12 / 2),
    vmem_bytes=64 << 20,
    sources=_CLOUD_AND_PEAK,
)
H100 = Target(
    name="h100",
    platform="cuda",
    device_kind="NVIDIA H100 80GB HBM3",
    # Partitions, hosts of each, devices of each host.
    topology="{shape}",
    smallest=(1, 1, 1),
    devices_a_chip=1,
    cores=1,
    clock_hz=1.98e9,
    hbm_bytes=84978434048,  # what the driver reports of the 80 GB
    hbm_bytes_per_second=3350e9,
    matrix_ops=_map(bf16=989e12, int8=1979e12, fp8=1979e12),
    multiprocessors=132,
    multiprocessor=Multiprocessor(
        registers=65536,
        shared_bytes=228 << 10,
        shared_bytes_a_block=227 << 10,
        reserved_bytes_a_block=1 << 10,
        threads=2048,
        blocks=32,
    ),
    sources=_map(hbm="h100", matrix_ops="h100", clock="h100", multiprocessor="h100"),
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {target.name: target for target in (V4, V5E, V5P, V6E, TPU7X, H100)}
)

_TEXT = re.compile(r"(?P<name>\w+)(?::(?P<shape>\d+(?:x\d+)*))?")


def parse_target(text: str) -> tuple[Target, tuple[int, ...]]:
    """`"v5e:2x4"`: the target, and the shape of its slice. `"v5e"` has shape `()`: one device.

    `"h100:8"` and `"h100:1x1x8"` are eight GPUs of one host. A slice of one device is `()` too.

    **Raises:** `ValueError` for a name that no target has, or a shape that is no slice of it.
    """
    found = _TEXT.fullmatch(text.strip().lower())
    known = ", ".join(TARGETS)
    if found is None or found["name"] not in TARGETS:
        raise ValueError(
            f"{text!r} is no target. Known are {known}, alone for one device or with the shape of "
            "a slice: v5e:2x4, v5p:2x2x2, h100:8."
        )
    target = TARGETS[found["name"]]
    if found["shape"] is None:
        return target, ()
    shape = tuple(map(int, found["shape"].split("x")))
    rank = len(target.smallest)
    if target.platform == "cuda" and len(shape) == 1:
        shape = (1, 1, *shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(
            f"{text!r} has a shape of {len(shape)} numbers where {target.name} wants {rank}, none "
            f"of them 0: {target.name}:{'x'.join(map(str, target.smallest))}, for example."
        )
    if math.prod(shape) == 1:
        if target.devices_a_chip > 1:
            raise ValueError(
                f"{text!r} is a chip of {target.devices_a_chip} devices, which the compiler does "
                f"not know alone. Say {target.name} for one device, or "
                f"{target.name}:{'x'.join(map(str, target.smallest))}."
            )
        return target, ()
    if target.platform == "tpu" and any(n % m for n, m in zip(shape, target.smallest, strict=True)):
        raise ValueError(
            f"{text!r} is no slice that the compiler knows: hosts have "
            f"{'x'.join(map(str, target.smallest))} chips, and a slice is made of whole hosts."
        )
    return target, shape
