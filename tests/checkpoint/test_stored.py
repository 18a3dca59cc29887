"""Arrays as stored: the bytes that docs/format.md promises, and back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxquant.checkpoint import _orbax, _stored, CheckpointError

# Codes, and the bytes worked out by hand: two's complement, the first of a pair in the low nibble.
BY_HAND = [
    ([1, 2, 3, 4], [4], [0x21, 0x43]),
    ([-1, 7, -8, 0], [2, 2], [0x7F, 0x08]),
    ([1, -2, 3], [3], [0xE1, 0x03]),
    ([1, 2, 3, 4, 5, 6], [2, 3], [0x21, 0x43, 0x65]),
    ([1, 2, 3, 4, 5, 6], [3, 2], [0x21, 0x43, 0x65]),
    ([5], [1, 1], [0x05]),
]


@pytest.mark.parametrize("codes, shape, packed", BY_HAND)
def test_nibbles_lie_as_worked_out_by_hand(codes, shape, packed):
    array = jnp.array(codes, jnp.int8).astype(jnp.int4).reshape(shape)
    stored = _stored.to_stored(array)
    assert stored.dtype == np.uint8
    assert list(stored.tobytes()) == packed
    assert stored.shape == _stored.stored_shape(tuple(shape), 4)


# Codes and bits, and the bytes worked out by hand: from the lowest bit on, two's complement.
STRINGS = [
    ([1, 0, 1, 1, 0, 0, 0, 1], 1, "uint8", [0b10001101]),
    ([1, -2, 0, -1], 2, "int8", [0b11001001]),
    ([1, 2, 3, 4, 5, 6, 7, 0], 3, "uint8", [0b11010001, 0b01011000, 0b00011111]),
    ([-1, 15, -16], 5, "int8", [0b11111111, 0b01000001]),
    ([127, 0, 85], 7, "uint8", [0b01111111, 0b01000000, 0b00010101]),
]


@pytest.mark.parametrize("codes, bits, dtype, packed", STRINGS)
def test_bit_strings_lie_as_worked_out_by_hand(codes, bits, dtype, packed):
    stored = _stored.to_stored(jnp.array(codes, dtype), bits)
    assert list(stored.tobytes()) == packed


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_of_any_width_come_back_whole_and_in_pieces(bits, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(_stored, "_AT_ONCE", 64)  # several rounds
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype == "int8" else (0, 2**bits)
    random = np.random.default_rng(bits)
    for i, shape in enumerate([(7,), (9, 5), (4, 24), (2, 3, 16), (0, 8), ()]):
        codes = random.integers(low, high, shape).astype(dtype)
        part = _stored.describe(codes, f"{i}/a.codes", bits)
        assert part.bytes == -(-codes.size * bits // 8)
        if codes.size:
            _orbax.write_arrays(tmp_path / f"{i}", {"a.codes": _stored.to_stored(codes, bits)})
        np.testing.assert_array_equal(_stored.read_part(tmp_path, part, None), codes)
    codes = random.integers(low, high, (4, 40)).astype(dtype)
    part = _stored.describe(codes, "g/a.codes", bits)
    _orbax.write_arrays(tmp_path / "g", {"a.codes": _stored.to_stored(codes, bits)})
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P(None, "x"))
    np.testing.assert_array_equal(_stored.read_part(tmp_path, part, sharding), codes)


DTYPES = "bool int8 uint8 int16 int32 uint32 float16 float32 bfloat16 float8_e4m3fn float8_e5m2 int4 uint4 float4_e2m1fn".split()  # fmt: skip # noqa: E501
SHAPES = [(), (1,), (7,), (3, 5), (4, 6), (2, 3, 8), (0, 4)]


def some(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array with as many different codes as fit."""
    values = np.arange(int(np.prod(shape))) % 256
    if dtype == "bool":
        return (values % 3 == 1).reshape(shape)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype in ("int4", "uint4", "float4_e2m1fn"):
        values = values % 16
        if dtype == "int4":
            return (values - 8).astype(kind).reshape(shape)
    if kind.itemsize == 1:
        return values.astype(np.uint8).view(kind).reshape(shape)
    return values.astype(kind).reshape(shape)


def write(tmp_path, array):
    part = _stored.describe(array, "group/a.plain")
    _orbax.write_arrays(tmp_path / "group", {"a.plain": _stored.to_stored(array)})
    return part


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_by_bit(dtype, tmp_path):
    arrays = {f"{i}.plain": some(dtype, shape) for i, shape in enumerate(SHAPES)}
    parts = {name: _stored.describe(a, f"group/{name}") for name, a in arrays.items()}
    stored = {name: _stored.to_stored(jnp.asarray(a)) for name, a in arrays.items() if a.size}
    for name in stored:
        part = parts[name]
        assert (stored[name].shape, stored[name].dtype) == (part.stored_shape, part.stored_dtype)
        assert stored[name].nbytes == part.bytes
        assert stored[name].dtype.isbuiltin
    _orbax.write_arrays(tmp_path / "group", stored)
    for name, part in parts.items():
        back = _stored.read_part(tmp_path, part, None)
        assert (back.shape, back.dtype) == (arrays[name].shape, arrays[name].dtype)
        assert np.asarray(back).tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x"), P("x", "y"), P(None, ("x", "y"))])
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("shape", [(4, 20), (8, 36), (4, 4)])
def test_an_array_is_read_shard_by_shard_even_where_shards_cut_bytes(dtype, shape, spec, tmp_path):
    array = some(dtype, shape)
    part = write(tmp_path, array)
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y")), spec)
    back = _stored.read_part(tmp_path, part, sharding)
    assert back.sharding == sharding
    assert np.asarray(back).tobytes() == array.tobytes()


def test_a_sharded_array_of_an_odd_length_is_read(tmp_path):
    array = some("int4", (4, 5))
    part = write(tmp_path, array)
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
    back = _stored.read_part(tmp_path, part, sharding)
    assert np.asarray(back).tobytes() == array.tobytes()


def test_sharded_arrays_are_saved_as_whole_ones(tmp_path):
    array = some("int4", (8, 6))
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
    stored = _stored.to_stored(jax.device_put(array, sharding))
    assert stored.tobytes() == _stored.to_stored(jnp.asarray(array)).tobytes()


def test_an_array_that_is_not_what_the_manifest_says_is_refused(tmp_path):
    write(tmp_path, some("int8", (3, 5)))
    part = _stored.describe(some("int8", (5, 3)), "group/a.plain")
    with pytest.raises(CheckpointError, match=r"int8\[3, 5\], but the manifest says int8\[5, 3\]"):
        _stored.read_part(tmp_path, part, None)


def test_64_bits_are_refused_where_jax_would_cut_them(tmp_path):
    part = write(tmp_path, np.arange(3))
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        _stored.read_part(tmp_path, part, None)


def test_an_unknown_dtype_is_named():
    with pytest.raises(CheckpointError, match="'float3'"):
        _stored.dtype_named("float3")
