"""Programs are compiled for chips that are not here, and what the compilers tell is read."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.aot import compile_for, mesh_for, parse_target
from jaxquant.ops import dot
from jaxquant.qarray import abstract_qarray, schemes

TPUS = ["v4", "v5e", "v5p", "v6e", "7x"]

pytestmark = pytest.mark.aot


def _shape(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", [*TPUS, "h100"])
def test_memory_is_that_of_the_arrays(name):
    target, _ = parse_target(name)
    out = compile_for(lambda x, w: x @ w, (_shape(16, 1024), _shape(1024, 512)), target)
    assert out.memory.arguments == 2 * (16 * 1024 + 1024 * 512)
    assert out.memory.outputs == 2 * 16 * 512
    assert out.fits and out.devices == 1
    assert out.hlo.bytes_moved >= out.memory.arguments + out.memory.outputs


@pytest.mark.parametrize("name", TPUS)
def test_a_schedule_has_both_sides(name):
    target, _ = parse_target(name)
    out = compile_for(lambda x, w: x @ w, (_shape(512, 1024), _shape(1024, 1024)), target)
    time = out.scheduled()
    assert time.known
    # Bundles may hand the matrix units more than they take: a fifth more on 7x.
    peak = 2 * 512 * 1024 * 1024 / target.matrix_ops["bf16"]
    assert 0.75 * peak <= time.compute_seconds <= 2 * peak
    assert time.memory_seconds == pytest.approx(out.memory_bound_seconds)
    assert out.memory_bound_seconds <= time.overlapped_seconds <= time.seconds
    (matmul,) = (step for step in out.hlo.steps if "dot_general" in step.op_name)
    assert out.schedule.programs[matmul.name].used["MXU"] > 0


def test_the_trace_sees_the_chip():
    seen = []

    def f(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x + 1.0

    for name in ("v5e", "v6e"):
        compile_for(f, (_shape(8, 128),), parse_target(name)[0], schedule=False)
    assert seen == ["TPU v5 lite", "TPU v6 lite"]


def test_the_same_program_is_scheduled_again():
    target, _ = parse_target("v5e")
    f = jax.jit(lambda x: x @ x)
    once, again = (compile_for(f, (_shape(256, 256),), target) for _ in range(2))
    assert once.schedule is not None and once.schedule == again.schedule


def test_programs_that_need_the_chip_are_not_kept_on_disk():
    """JAX's cache would, and say at the next reading that it cannot."""
    config: Any = jax.config
    kept = pathlib.Path(config.jax_compilation_cache_dir)
    least = config.jax_persistent_cache_min_compile_time_secs
    target, _ = parse_target("v5e")

    def lonely(x):
        return x @ x

    compile_for(jax.jit(lonely), (_shape(256, 256),), target, schedule=False)
    assert not list(kept.glob("jit_lonely-*"))
    assert config.jax_persistent_cache_min_compile_time_secs == least
    jax.jit(lonely)(jnp.ones((8, 8)))
    assert list(kept.glob("jit_lonely-*"))


def test_a_qarray_is_an_argument():
    target, _ = parse_target("v5e")
    q = abstract_qarray((1024, 512), jnp.bfloat16, schemes.INT4_G64, contracted=(0,))
    out = compile_for(
        lambda x, w: dot(x, w, backend="xla"), (_shape(16, 1024), q), target, schedule=False
    )
    # Half a byte a code.
    codes, scale = 1024 * 512 // 2, 1024 // 64 * 512 * q.scale.dtype.itemsize
    assert out.memory.arguments == 2 * 16 * 1024 + codes + scale
    assert out.schedule is None
    with pytest.raises(ValueError, match="has no schedule"):
        out.scheduled()


@pytest.mark.parametrize("text", ["v5e:2x4", "7x:2x2x1", "h100:8"])
def test_a_row_parallel_matmul_sums_over_the_mesh(text):
    target, shape = parse_target(text)
    mesh = mesh_for(target, shape, {"model": 8})
    x = jax.ShapeDtypeStruct(
        (16, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "model"))
    )
    w = jax.ShapeDtypeStruct(
        (1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("model"))
    )

    def whole(x, w):
        return jax.lax.with_sharding_constraint(x @ w, PartitionSpec())

    out = compile_for(whole, (x, w), target, schedule=False)
    assert out.devices == 8
    assert out.memory.arguments == 2 * (16 * 1024 + 1024 * 512) // 8
    (sum_,) = out.hlo.collectives
    assert sum_.kind == "all-reduce" and sum_.runs == 1
    # Whatever type it is summed in.
    assert sum_.bytes in (2 * 16 * 512, 4 * 16 * 512)


def test_arguments_on_two_meshes_are_refused():
    target, shape = parse_target("v5e:2x4")
    meshes = [mesh_for(target, shape, axes) for axes in ({"a": 8}, {"b": 8})]
    args = tuple(
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        for mesh in meshes
    )
    with pytest.raises(ValueError, match="sharded over two meshes"):
        compile_for(lambda x, y: x + y, args, target)


def test_a_mesh_of_another_chip_is_refused():
    mesh = mesh_for(parse_target("v6e")[0])
    with pytest.raises(ValueError, match="is made of TPU v6 lite; v5e is TPU v5 lite"):
        compile_for(lambda x: x, (_shape(8),), parse_target("v5e")[0], mesh=mesh)


def test_donated_memory_is_counted_once():
    target, _ = parse_target("v5e")
    x = _shape(1024, 1024)
    kept, given = (
        compile_for(lambda x: x + 1, (x,), target, donate=donate, schedule=False).memory
        for donate in ((), (0,))
    )
    assert given.aliased == given.outputs == kept.outputs and kept.aliased == 0
    assert given.arguments + given.outputs - given.aliased == given.arguments


@pytest.mark.parametrize(("name", "gib"), [("v5e", 9), ("h100", 41)])
def test_a_program_that_does_not_fit(name, gib):
    """Its argument and its result are this large each."""
    target, _ = parse_target(name)
    args = ((_shape(gib << 29),), target)
    if target.platform == "tpu":
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            compile_for(lambda x: x + 1, *args, schedule=False)
    else:
        assert not compile_for(lambda x: x + 1, *args, schedule=False).fits
