"""Devices of chips that are not here, and the compilers that know them.

libtpu reads its flags once, when it is loaded. So the first call that needs it loads it here, with
flags that make it write its schedules into a folder of this process; the environment is restored
afterwards, so that processes started later find it as it was.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib.resources
import importlib.util
import math
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from ._targets import Target

_INSTALL = 'Run `pip install "jaxquant[aot]"` (Linux on x86_64).'

_ENVIRONMENT = {
    # Do not ask the metadata server of a cloud machine which TPU this is.
    "TPU_SKIP_MDS_QUERY": "1",
    # Without these two libtpu prints that it could not find out; the topology names the chip.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Errors come back as exceptions.
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    # libtpu guards a chip that is here by a lock file, which compilers need not share.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# The passes whose dumps are read; all of them together are a hundred megabytes a program.
_PASSES = "final_bundles|final_hlo|dedup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dumps:
    """The folder that libtpu writes schedules to, and whose turn it is to compile."""

    folder: pathlib.Path
    turn: threading.Lock

    @contextlib.contextmanager
    def of_one_program(self) -> Iterator[pathlib.Path]:
        """Within it, the folder holds what one compilation wrote; empty before and after."""
        with self.turn:
            self._empty()
            try:
                yield self.folder
            finally:
                self._empty()

    def _empty(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


@contextlib.contextmanager
def _environment(entries: Mapping[str, str]) -> Iterator[None]:
    """Sets what is not set, and puts it back."""
    before = {name: os.environ.get(name) for name in entries}
    os.environ.update(entries)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_loaded(library: str) -> bool:
    maps = pathlib.Path("/proc/self/maps")
    return maps.is_file() and library in maps.read_text()


@functools.cache
def _libtpu() -> Dumps | None:
    """Loads libtpu. None if somebody loaded it before, without the flags."""
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(f"Compiling for a TPU needs the package libtpu. {_INSTALL}")
    _check_backend()
    loaded = _is_loaded("libtpu.so")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxquant-aot-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = (
        f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} "
        f"--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
    )
    with _environment({**_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags.strip()}):
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return None if loaded else Dumps(folder=folder, turn=threading.Lock())


def _check_backend() -> None:
    """JAX tries to start whatever is installed, libtpu too, unless it is told not to."""
    config: Any = jax.config
    platforms = config.jax_platforms
    if platforms != "cpu":
        raise RuntimeError(
            f"JAX is set to run on {platforms or 'whatever it finds'}; compiling for chips that "
            "are not here wants it to run on the CPU alone, so that it leaves their libraries to "
            "the compilers. Start Python with JAX_PLATFORMS=cpu, or call "
            'jax.config.update("jax_platforms", "cpu") before anything else uses JAX.'
        )


def tpu_dumps() -> Dumps:
    """Where libtpu writes schedules.

    **Raises:** `ImportError` without libtpu; `RuntimeError` if it was loaded before, so that it
    writes none.
    """
    dumps = _libtpu()
    if dumps is None:
        raise RuntimeError(
            "libtpu was loaded before jaxquant.aot, without the flags that make it write its "
            "schedules, and it reads them only once. Compile with jaxquant.aot before anything "
            "else touches a TPU, start Python with JAX_PLATFORMS=cpu, or pass schedule=False."
        )
    return dumps


def _tpu_devices(target: Target, shape: tuple[int, ...]):
    _libtpu()
    # Both cores of a chip as one device: the way JAX runs v4 and v5p.
    config = {"chip_config_name": "megacore"} if target.cores > 1 else {}
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=target.topology.format(shape="x".join(map(str, shape))),
        **config,
    )


def _cuda_devices(target: Target, shape: tuple[int, ...]):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ImportError(
            f"Compiling for an NVIDIA GPU needs the package jax-cuda12-plugin. {_INSTALL}"
        )
    _check_backend()
    config = importlib.resources.files("jaxquant.aot") / f"{target.name}.textproto"
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=config.read_text(encoding="utf-8"),
        topology=target.topology.format(shape="x".join(map(str, shape))),
    )


def mesh_for(
    target: Target, shape: tuple[int, ...] = (), axes: Mapping[str, int] | None = None
) -> Mesh:
    """A mesh of devices that are not here, to lay shardings over.

    `shape` is that of the slice (`parse_target`); `()` is one device. `axes` are the mesh's axes by
    name, whose sizes make up the devices of the slice; one axis `devices` if not given.

    **Raises:** `ImportError` without the compiler's package; `ValueError` if `axes` do not make
    up the slice.
    """
    count = target.devices(shape)
    axes = {"devices": count} if axes is None else dict(axes)
    names, sizes = tuple(axes), tuple(axes.values())
    wanted = math.prod(sizes)
    if wanted != count:
        slice_ = f"{target.name}:{'x'.join(map(str, shape))}" if shape else target.name
        raise ValueError(f"The axes {axes} take {wanted} devices; {slice_} has {count}.")
    find = {"tpu": _tpu_devices, "cuda": _cuda_devices}[target.platform]
    topology = find(target, shape or target.smallest)
    if count == 1:
        devices = np.array(topology.devices[:1]).reshape(sizes)
    else:
        devices = mesh_utils.create_device_mesh(
            sizes, devices=topology.devices, allow_split_physical_axes=True
        )
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
