"""No number in a GGUF file is believed: each cut and each changed length is one clear, quick
error.
"""

import gguf
import numpy as np
import pytest

from jaxquant.checkpoint import CheckpointError
from jaxquant.checkpoint._gguf_header import read_header

HUGE = (2**63, 2**64 - 1, 2**62, 2**32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every kind of entry, and tensors of three types."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -5)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 4000000000)
    writer.add_int32("a.i32", -70000)
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "größer")
    writer.add_array("a.strings", ["one", "", "three"])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.nested", [[1, 2], [3]])
    rows = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
    q8 = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("whole", rows)
    writer.add_tensor("half", rows.astype(np.float16))
    writer.add_tensor("blocks", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _read(raw):
    return read_header(memoryview(raw), "some.gguf")


def _refused(raw):
    with pytest.raises(CheckpointError) as caught:
        _read(raw)
    message = str(caught.value)
    assert "some.gguf" in message and "\n" not in message and len(message) < 400
    return message


def test_what_was_written_is_read(small):
    header = _read(small)
    read = {k: v for k, v in header.metadata.items() if k.startswith("a.")}
    assert read == {
        "a.u8": 200,
        "a.i8": -5,
        "a.u16": 60000,
        "a.i16": -300,
        "a.u32": 4000000000,
        "a.i32": -70000,
        "a.u64": 2**63,
        "a.i64": -(2**62),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.string": "größer",
        "a.strings": ["one", "", "three"],
        "a.floats": [0.5, 1.5],
        "a.nested": [[1, 2], [3]],
    }
    blocks = header.tensors["blocks"]
    assert (blocks.shape, blocks.type.name, blocks.nbytes) == ((4, 64), "Q8_0", 4 * 2 * 34)


def test_the_package_gguf_reads_the_same(small, tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    reader = gguf.GGUFReader(path)
    header = _read(small)
    assert set(header.metadata) == {k for k in reader.fields if not k.startswith("GGUF.")}
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.start, ours.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert list(reversed(ours.shape)) == tensor.shape.tolist()


def _end(raw):
    return max(tensor.start + tensor.nbytes for tensor in _read(raw).tensors.values())


def test_a_file_cut_anywhere_is_refused(small):
    # All places, which include any twenty: the header is small.
    for length in range(_end(small)):
        _refused(small[:length])


def _lengths(raw):
    """Where the file has lengths, counts, dimensions and offsets, found by watching the reader."""
    places = [8, 16]
    at = 24
    scalars = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(where, size):
        return int.from_bytes(raw[where : where + size], "little")

    def string():
        nonlocal at
        places.append(at)
        at += 8 + number(at, 8)

    def value(kind):
        nonlocal at
        if kind in scalars:
            at += scalars[kind]
        elif kind == 8:
            string()
        else:
            item, count = number(at, 4), number(at + 4, 8)
            places.append(at + 4)
            at += 12
            for _ in range(count):
                value(item)

    for _ in range(number(16, 8)):
        string()
        at += 4
        value(number(at - 4, 4))
    for _ in range(number(8, 8)):
        string()
        dimensions = number(at, 4)
        places += [at + 4 + 8 * i for i in range(dimensions)]
        places.append(at + 4 + 8 * dimensions + 4)
        at += 4 + 8 * dimensions + 4 + 8
    return places


@pytest.mark.parametrize("value", HUGE)
def test_every_length_set_to_something_huge_is_refused(small, value):
    places = _lengths(small)
    assert len(places) == 40
    for place in places:
        _refused(small[:place] + value.to_bytes(8, "little") + small[place + 8 :])


def test_any_changed_byte_of_the_header_is_read_or_refused(small):
    start = min(tensor.start for tensor in _read(small).tensors.values())
    for place in range(start):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(small)
            changed[place] ^= flip
            try:
                _read(bytes(changed))
            except CheckpointError as error:
                assert "some.gguf" in str(error)


def _file(metadata=b"", entries=0, tensors=b"", count=0, version=3, data=b"\0" * 256):
    head = b"GGUF" + version.to_bytes(4, "little")
    head += count.to_bytes(8, "little") + entries.to_bytes(8, "little") + metadata + tensors
    return head + b"\0" * (-len(head) % 32) + data


def _string(text):
    return len(text).to_bytes(8, "little") + text.encode()


def _tensor(name="t", shape=(32,), kind=0, offset=0):
    raw = _string(name) + len(shape).to_bytes(4, "little")
    raw += b"".join(size.to_bytes(8, "little") for size in shape)
    return raw + kind.to_bytes(4, "little") + offset.to_bytes(8, "little")


def _entry(key, kind, raw):
    return _string(key) + kind.to_bytes(4, "little") + raw


DEEP = b"".join((9).to_bytes(4, "little") + (1).to_bytes(8, "little") for _ in range(40))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the magic needs 4 bytes and the file has 0 left"),
        (b"PK\3\4" + b"\0" * 99, "starts with b'PK"),
        (_file(version=1), "has GGUF version 1; versions 2 and 3"),
        (_file(version=3 << 24), "It is big-endian"),
        (_file(_entry("k", 99, b"\0"), 1), "'k' has type 99, and GGUF knows 0 to 12"),
        (_file(_entry("k", 9, DEEP), 1), "nests arrays deeper than 4"),
        (_file(_entry("k", 0, b"\1") * 2, 2), "metadata key 'k' appears twice"),
        (_file(_entry("k", 8, (1).to_bytes(8, "little") + b"\xff"), 1), "is not UTF-8"),
        (_file(_entry("general.alignment", 4, (0).to_bytes(4, "little")), 1), "alignment is 0, a"),
        (_file(_entry("general.alignment", 4, (12).to_bytes(4, "little")), 1), "alignment is 12"),
        (_file(_entry("general.alignment", 8, _string("a")), 1), "alignment is 'a'"),
        (_file(tensors=_tensor(shape=()), count=1), "0 dimensions, and 1 to 4"),
        (_file(tensors=_tensor(shape=(1,) * 5), count=1), "5 dimensions, and 1 to 4"),
        (_file(tensors=_tensor(shape=(0, 3)), count=1), r"shape \[3, 0\], and no axis may be empt"),
        (_file(tensors=_tensor(shape=(2**32, 2**32)), count=1), "ends at byte 737869"),
        (_file(tensors=_tensor(kind=77), count=1), "'t' has the unknown type 77"),
        (_file(tensors=_tensor(kind=8, shape=(33,)), count=1), r"blocks of 32 \(Q8_0\)"),
        (_file(tensors=_tensor(offset=3), count=1), "offset 3, which is no multiple of 32"),
        (_file(tensors=_tensor(offset=224), count=1), "ends at byte 416 and the file has 320"),
        (_file(tensors=_tensor() * 2, count=2), "tensor 't' appears twice"),
        (_file(tensors=_tensor("a") + _tensor("b"), count=2), "'a' and 'b' overlap"),
    ],
)
def test_a_header_that_makes_no_sense_is_one_clear_error(raw, message):
    with pytest.raises(CheckpointError, match=message):
        _read(raw)
