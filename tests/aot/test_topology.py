"""Devices that are not here, and how the compilers are loaded."""

import os
import subprocess
import sys

import pytest

from jaxquant.aot import mesh_for, parse_target
from jaxquant.aot._topology import tpu_dumps

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("text", ["v4", "v5e", "v5p", "v6e", "7x", "h100"])
def test_one_device_of_each_target(text):
    target, shape = parse_target(text)
    mesh = mesh_for(target, shape)
    (device,) = mesh.devices.flat
    assert dict(mesh.shape) == {"devices": 1} and device.device_kind == target.device_kind
    if target.platform == "tpu":
        # Both cores of v4 and v5p make one device.
        assert device.num_cores == target.cores


@pytest.mark.parametrize(
    "text", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:4x4", "7x:2x2x1", "h100:8"]
)
def test_a_slice_has_the_devices_that_the_target_says(text):
    target, shape = parse_target(text)
    count = target.devices(shape)
    mesh = mesh_for(target, shape, {"data": 2, "model": count // 2})
    assert dict(mesh.shape) == {"data": 2, "model": count // 2}
    assert len({device.id for device in mesh.devices.flat}) == count


def test_axes_that_do_not_make_up_the_slice_are_refused():
    target, shape = parse_target("v5e:2x4")
    with pytest.raises(ValueError, match=r"take 4 devices; v5e:2x4 has 8"):
        mesh_for(target, shape, {"model": 4})


def test_loading_leaves_the_environment_and_the_folder_as_they_were():
    dumps = tpu_dumps()
    # JAX itself sets flags there when it is imported.
    assert str(dumps.folder) not in os.environ.get("LIBTPU_INIT_ARGS", "")
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD" not in os.environ
    with dumps.of_one_program() as folder:
        (folder / "a").write_text("")
    assert not list(folder.iterdir())


_LOADED_BEFORE = """
import os
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
from jax.experimental import topologies
topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
import jax, jax.numpy as jnp
from jaxquant.aot import compile_for, parse_target
args = ((jax.ShapeDtypeStruct((8, 128), jnp.float32),), parse_target("v5e")[0])
assert compile_for(lambda x: x + 1, *args, schedule=False).memory.outputs == 4096
try:
    compile_for(lambda x: x + 1, *args)
except RuntimeError as error:
    assert "libtpu was loaded before jaxquant.aot" in str(error)
else:
    raise SystemExit("It was not refused.")
"""


def test_a_library_that_was_loaded_without_flags_gives_no_schedule():
    # Beside this process, which has libtpu too.
    tpu_dumps()
    subprocess.run([sys.executable, "-c", _LOADED_BEFORE], check=True)
