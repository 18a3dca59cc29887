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


@pytest.mark.parametrize("text", ["v5e", "h100"])
def test_jax_must_be_told_to_run_on_the_cpu(text, monkeypatch):
    code = (
        "import jax\nfrom jaxquant.aot import mesh_for, parse_target\n"
        f"try: mesh_for(parse_target({text!r})[0])\n"
        "except RuntimeError as error: print(error)\n"
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "JAX is set to run on whatever it finds" in ran.stdout
    assert "JAX_PLATFORMS=cpu" in ran.stdout


@pytest.mark.parametrize(("text", "package"), [("v5e", "libtpu"), ("h100", "jax-cuda12-plugin")])
def test_a_missing_compiler_says_what_to_install(text, package):
    """In a process of its own, where the package is hidden."""
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        f"hidden = {package.replace('-', '_')!r}\n"
        "u.find_spec = lambda name, *rest: None if name == hidden else find(name, *rest)\n"
        "from jaxquant.aot import mesh_for, parse_target\n"
        f"try: mesh_for(parse_target({text!r})[0])\n"
        "except ImportError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"needs the package {package}. Run `pip install" in ran.stdout
    assert "jaxquant[aot]" in ran.stdout


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
