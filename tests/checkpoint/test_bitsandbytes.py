import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.checkpoint._bitsandbytes import (
    double_quantize,
    KINDS,
    pack_high_first,
    read_bitsandbytes,
    unpack_high_first,
    write_bitsandbytes,
)
from jaxquant.checkpoint._errors import CheckpointError
from jaxquant.numerics import DYNAMIC8, FP4, INT4, NF4
from jaxquant.qarray import (
    check_qarray,
    dequantize,
    PER_CHANNEL,
    PER_TENSOR,
    QArray,
    quantize_array,
    Scheme,
    schemes,
    Tile,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bitsandbytes_double.npz"


def _normal(*shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def _nested(kept: int | None, contracted: int | None = None) -> Scheme:
    """NF4 whose scales are held in tiles of the given numbers of scales."""
    tile = Tile(contracted=contracted, kept=kept, ragged=True)
    scale = Scheme(values=DYNAMIC8, tile=tile, centered=True)
    return Scheme(values=NF4, tile=Tile(contracted=64), scale=scale, codes_first=True)


def _state(tensors: dict[str, np.ndarray]) -> dict:
    (key,) = (key for key in tensors if "quant_state" in key)
    return json.loads(tensors[key].tobytes())


def test_the_first_code_is_in_the_high_nibble():
    packed = pack_high_first(np.asarray([1, 2, 15, 0, 9], np.uint8), NF4)
    assert packed.tolist() == [0x12, 0xF0, 0x97]  # code 7 of NF4 is 0
    assert pack_high_first(np.asarray([9], np.uint8), FP4).tolist() == [0x90]
    assert unpack_high_first(packed, 5).tolist() == [1, 2, 15, 0, 9]


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(6, 128), (3, 2, 64), (165,), (8, 704)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind: str, shape: tuple[int, ...], double: bool):
    ragged = bool(shape[-1] % 64)
    scheme = Scheme(values=KINDS[kind], tile=Tile(contracted=64, ragged=ragged))
    q = quantize_array(_normal(*shape).astype(jnp.bfloat16), scheme)
    tensors = write_bitsandbytes(q, name="w", double=double)
    again = read_bitsandbytes(tensors, name="w")
    check_qarray(again)
    assert again.shape == shape and again.dtype == jnp.bfloat16
    assert _state(tensors)["dtype"] == "bfloat16"
    np.testing.assert_array_equal(again.codes, q.codes)
    if not double:
        np.testing.assert_array_equal(again.scale, q.scale)
    rewritten = write_bitsandbytes(again, name="w")
    if double and isinstance(again.scale, QArray):
        assert rewritten.keys() == tensors.keys()
    for key in rewritten.keys() & tensors.keys() - {key for key in tensors if double}:
        np.testing.assert_array_equal(rewritten[key], tensors[key])


def test_scales_that_are_codes_stay_codes_where_their_blocks_are_boxes():
    # 32 scales a row, so 8 rows a block; 20 rows leave a short one.
    w = _normal(20, 2048)
    q = quantize_array(w, _nested(kept=8))
    tensors = write_bitsandbytes(q)
    assert tensors["weight.absmax"].dtype == np.uint8
    assert tensors["weight.nested_absmax"].shape == (3,)
    again = read_bitsandbytes(tensors)
    assert isinstance(again.scale, QArray) and again.scheme == q.scheme
    check_qarray(again)
    np.testing.assert_array_equal(dequantize(again), dequantize(q))
    for key, tensor in write_bitsandbytes(again).items():
        np.testing.assert_array_equal(tensor, tensors[key])


def test_scales_become_float32_where_their_blocks_are_no_boxes():
    # 11 scales a row: 256 of them end within one.
    q = quantize_array(_normal(40, 704), schemes.NF4)
    tensors = write_bitsandbytes(q, double=True)
    again = read_bitsandbytes(tensors)
    assert not isinstance(again.scale, QArray)
    table = np.asarray(DYNAMIC8.table, np.float32)
    nested = np.repeat(tensors["weight.nested_absmax"], 256)[:440]
    offset = np.float32(_state(tensors)["nested_offset"])
    wanted = table[tensors["weight.absmax"]] * nested + offset
    np.testing.assert_array_equal(np.asarray(again.scale).ravel(), wanted)


@pytest.mark.parametrize("case", ["many", "zeros"])
def test_a_scheme_that_tiles_scales_alike_gives_the_bytes_of_bitsandbytes(case: str):
    golden = np.load(GOLDEN)
    w = jnp.asarray(golden[case].astype(np.float32))
    tensors = write_bitsandbytes(quantize_array(w, _nested(kept=256)))
    key = f"{case}.nf4.64"
    np.testing.assert_array_equal(tensors["weight"].ravel(), golden[f"{key}.packed"])
    np.testing.assert_array_equal(tensors["weight.absmax"].ravel(), golden[f"{key}.absmax_codes"])


@pytest.mark.parametrize("case", ["many.nf4.64", "many.nf4.128", "zeros.nf4.64"])
def test_reading_gives_the_values_that_bitsandbytes_gives(case: str):
    golden = np.load(GOLDEN)
    name, kind, block = case.split(".")
    w = golden[name].astype(np.float32).reshape(-1)
    q = quantize_array(
        jnp.asarray(w), Scheme(values=KINDS[kind], tile=Tile(contracted=int(block), ragged=True))
    )
    tensors = write_bitsandbytes(q, double=True)
    # Their bytes in place of ours, which are the same, and their mean, which may differ by an ulp.
    tensors["weight.absmax"] = golden[f"{case}.absmax_codes_cpu"]
    tensors["weight.nested_absmax"] = golden[f"{case}.nested_absmax"]
    state = _state(tensors) | {"nested_offset": float(golden[f"{case}.offset"])}
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(
        json.dumps(state).encode(), np.uint8
    )
    wanted = golden[f"{case}.values"]
    got = np.asarray(dequantize(read_bitsandbytes(tensors)))[-len(wanted) :]
    # A product and a sum, rounded twice there; a compiler may round them once.
    np.testing.assert_allclose(got, wanted, rtol=2.0**-22)


def test_a_block_of_zeros_has_no_scale():
    w = _normal(4, 64).at[1].set(0)
    absmax = write_bitsandbytes(quantize_array(w, schemes.NF4))["weight.absmax"]
    assert absmax[1] == 0 and (absmax[[0, 2, 3]] > 0).all()


def test_equal_scales_leave_nothing_to_hold():
    codes, nested, mean = double_quantize(np.full(3, 2.5, np.float32))
    assert mean == 2.5 and nested.tolist() == [0] and codes.tolist() == [127] * 3
    assert DYNAMIC8.table[127] == 0


@pytest.mark.parametrize(
    "scheme, contracted, message",
    [
        (Scheme(values=INT4, tile=Tile(contracted=64)), -1, "keeps NF4 and FP4; got codes of INT4"),
        (Scheme(values=NF4, tile=Tile(contracted=64)), 0, "runs of the flattened array"),
        (Scheme(values=NF4, tile=PER_TENSOR), -1, "kernels for blocks of 32, 64"),
        (Scheme(values=NF4, tile=Tile(contracted=96, ragged=True)), -1, "runs of the flattened"),
        (_nested(kept=2), -1, "256 in a run"),
        (Scheme(values=NF4, tile=PER_CHANNEL), -1, None),
    ],
    ids=["int4", "columns", "tensor", "straddling", "nested", "channel"],
)
def test_tiles_that_are_no_runs_are_refused(scheme: Scheme, contracted: int, message: str | None):
    q = quantize_array(_normal(128, 256), scheme, contracted=(contracted,))
    if message is None:
        assert write_bitsandbytes(q)["weight.absmax"].size == q.scale.size
    else:
        with pytest.raises(ValueError, match=message):
            write_bitsandbytes(q)


def _without(tensors: dict, *keys: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


def _with_state(tensors: dict, **fields: object) -> dict:
    key = "weight.quant_state.bitsandbytes__nf4"
    text = json.dumps({**_state(tensors), **fields}).encode()
    return {**tensors, key: np.frombuffer(text, np.uint8)}


BROKEN = {
    "not of bitsandbytes": (
        lambda t: _without(t, "weight.quant_state.bitsandbytes__nf4"),
        "no quant_state of nf4 or fp4",
    ),
    "not JSON": (
        lambda t: {**t, "weight.quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)},
        "is not JSON",
    ),
    "no absmax": (lambda t: _without(t, "weight.absmax"), "without weight.absmax"),
    "no nested absmax": (
        lambda t: _without(t, "weight.nested_absmax"),
        "without weight.nested_absmax",
    ),
    "a field of another type": (lambda t: _with_state(t, blocksize="64"), "blocksize is '64'"),
    "another table": (
        lambda t: {**t, "weight.quant_map": np.arange(16, dtype=np.float32)},
        "quant_map is not the table of NF4",
    ),
    "too few bytes": (lambda t: {**t, "weight": t["weight"][:5]}, "5 bytes and 12 scales"),
    "too few nested": (
        lambda t: {**t, "weight.nested_absmax": np.zeros(0, np.float32)},
        "holds 0 scales for 12 blocks",
    ),
    "straddling": (lambda t: _with_state(t, shape=[12, 65]), "straddle rows of 65"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_refused(case: str):
    change, message = BROKEN[case]
    tensors = write_bitsandbytes(quantize_array(_normal(6, 128), schemes.NF4), double=True)
    with pytest.raises(CheckpointError, match=message):
        read_bitsandbytes(change(tensors))
