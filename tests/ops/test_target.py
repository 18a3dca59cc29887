"""A trace is for the device of the mesh in force, else for the one that JAX runs on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxquant.ops._target import Device, target_device


def _mesh(kind: str, cores: int, platform: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)


def test_without_a_mesh_it_is_the_one_that_jax_runs_on():
    assert target_device() == Device(platform="cpu", kind="cpu")
    with jax.default_device(jax.devices()[1]):
        assert target_device() == Device(platform="cpu", kind="cpu")


def test_a_mesh_in_force_says_which_chip_it_is_and_a_jitted_function_is_traced_for_each():
    seen = []

    x = jnp.zeros(3)

    @jax.jit
    def f(x):
        seen.append(target_device())
        return x

    with jax.sharding.use_abstract_mesh(_mesh("TPU v5 lite", 1, "tpu")):
        f.trace(x)
    with jax.sharding.use_abstract_mesh(_mesh("TPU v4", 2, "tpu")):
        f.trace(x)
    f.trace(x)
    assert seen == [
        Device(platform="tpu", kind="TPU v5 lite"),
        Device(platform="tpu", kind="TPU v4", cores=2),
        Device(platform="cpu", kind="cpu"),
    ]
    assert [device.tpu_generation for device in seen[:2]] == [5, 4]


def test_gpu_is_called_cuda():
    with jax.sharding.use_abstract_mesh(_mesh("NVIDIA H100 80GB HBM3", 1, "gpu")):
        assert target_device().platform == "cuda"


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="'TPU v99' is no known kind of TPU; known are TPU v4"):
        _ = Device(platform="tpu", kind="TPU v99").tpu_generation
