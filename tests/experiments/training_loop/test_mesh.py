import pytest
from jax.sharding import PartitionSpec as P
from training_loop import Devices, make_mesh
from training_loop.mesh import spec_of


@pytest.mark.parametrize(
    "shape, wanted",
    [
        ((256, 64), P("fsdp")),
        ((64, 256), P(None, "fsdp")),
        ((128, 128), P(None, "fsdp")),
        ((127, 128), P(None, "fsdp")),
        ((127, 129), P()),
        ((64,), P()),
        ((3, 4096, 5), P(None, "fsdp")),
        ((), P()),
    ],
)
def test_the_longest_axis_that_can_be_is_split(shape, wanted):
    assert spec_of(shape, make_mesh(Devices(fsdp=4))) == wanted


def test_without_fsdp_every_device_has_all_weights():
    assert spec_of((256, 256), make_mesh(Devices(data=4))) == P()
