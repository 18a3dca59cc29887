"""Files that PyTorch wrote give its numbers; no number in them is believed.

`tests/golden/make_torch_files.py` says how the files were made.
"""

import pathlib
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxquant.checkpoint import CheckpointError, LazyArray, open_torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FILES = ("torch_legacy.pt", "torch_zip.pt", "torch_zip_protocol4.pt")
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
COUNTED = np.arange(-3, 3).reshape(2, 3)
WANTED = {
    **{name: COUNTED.astype(name) for name in ("float64", "float32", "float16")},
    **{name: COUNTED.astype(name) for name in ("int64", "int32", "int16", "int8", "bool")},
    "bfloat16": COUNTED.astype(ml_dtypes.bfloat16),
    "uint8": COUNTED.astype(np.int8).view(np.uint8),
    "transposed": BASE.T,
    "slice": BASE[1:, ::2],
    "shared": BASE,
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 5), np.float32),
    "parameter": np.array([1, -2], np.float32),
    "norm.weight": np.ones(2, np.float32),
    "norm.bias": np.zeros(2, np.float32),
    "norm.running_mean": np.zeros(2, np.float32),
    "norm.running_var": np.ones(2, np.float32),
    "norm.num_batches_tracked": np.int64(0),
}


@pytest.mark.parametrize("file", FILES)
def test_what_torch_wrote_is_read(file):
    opened = open_torch(GOLDEN / file)
    assert set(opened.tensors) == set(WANTED) and opened.others == ("note",)
    for name, wanted in WANTED.items():
        lazy = opened.lazy(name)
        assert isinstance(lazy, LazyArray)
        assert (lazy.shape, lazy.dtype) == (wanted.shape, wanted.dtype)
        array = lazy.read()
        np.testing.assert_array_equal(array, wanted)
        assert array.flags.c_contiguous and array.flags.owndata
    assert opened.describe().startswith("float32/int64/")


def test_a_dict_inside_a_dict_is_had_by_its_key():
    with pytest.raises(CheckpointError, match=r"dict of 2 \('epoch', 'state_dict'\).*with key="):
        open_torch(GOLDEN / "torch_nested.pt")
    with pytest.raises(CheckpointError, match="has no 'model'"):
        open_torch(GOLDEN / "torch_nested.pt", key="model")
    opened = open_torch(GOLDEN / "torch_nested.pt", key="state_dict")
    np.testing.assert_array_equal(opened.lazy("w").read(), BASE)
    with pytest.raises(CheckpointError, match="no tensor 'v' among its 1"):
        opened.lazy("v")


def _outcome(path: pathlib.Path, raw: bytes, key: str | None = None) -> str | None:
    """`None` when every tensor can be read, else the one kind of error that there may be."""
    path.write_bytes(raw)
    try:
        opened = open_torch(path, key=key)
        for name in opened.tensors:
            opened.lazy(name).read()
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 500
        return message
    return None


# pickletools decodes an instruction that only a damaged file has (STRING) with this complaint.
@pytest.mark.filterwarnings("ignore:invalid (escape|octal)")
@pytest.mark.parametrize("file", ["torch_nested.pt", "torch_nested_zip.pt"])
def test_every_cut_is_one_clear_error(file, tmp_path):
    raw = (GOLDEN / file).read_bytes()
    assert _outcome(tmp_path / "cut.pt", raw, key="state_dict") is None
    for end in range(len(raw)):
        assert _outcome(tmp_path / "cut.pt", raw[:end], key="state_dict") is not None, end


@pytest.mark.filterwarnings("ignore:invalid (escape|octal)")
@pytest.mark.parametrize("file", FILES)
def test_a_changed_byte_is_read_or_refused(file, tmp_path):
    raw = (GOLDEN / file).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(250):
        changed = bytearray(raw)
        for at in rng.integers(len(raw), size=rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        outcomes.add(_outcome(tmp_path / "changed.pt", bytes(changed)) is None)
    assert outcomes == {True, False}


# In torch_legacy.pt, "shared" is described by `K\x00` (offset 0), `K\x04K\x06\x86` (shape),
# `K\x06K\x01\x86` (strides).
SHARED = re.compile(rb"K\x00K\x04K\x06\x86(q.|r.{4})K\x06K\x01\x86", re.DOTALL)


@pytest.mark.parametrize(
    ("part", "other", "problem"),
    [
        (b"K\x00K\x04", b"K\x01K\x04", "reaches element 24 of a storage of 24"),
        (b"K\x04K\x06\x86", b"K\x05K\x06\x86", "has more elements than its storage"),
        (b"K\x04K\x06\x86", b"K\x04K\x05\x86", None),
        (b"K\x06K\x01\x86", b"K\x07K\x01\x86", "reaches element 26 of a storage of 24"),
        (b"K\x06K\x01\x86", b"K\x00K\x00\x86", None),
        (b"K\x04K\x06\x86", b"J\xff\xff\xff\xffK\x06\x86", "negative size, stride or offset"),
        (b"K\x06K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "negative size, stride or offset"),
        (b"K\x06K\x01\x86", b"K\x06\x85", "has 2 axes and 1 strides"),
        (b"K\x04K\x06\x86", b"\x8a\x07" + b"\x7f" * 7 + b"K\x00\x86", "more elements than its"),
        (b"K\x04K\x06\x86", b"\x8a\x0f" + b"\x7f" * 15 + b"K\x06\x86", "more elements than its"),
        (b"K\x06K\x01\x86", b"\x8a\x0f" + b"\x7f" * 15 + b"K\x01\x86", "reaches element"),
    ],
)
def test_a_view_that_leaves_its_storage_is_refused(part, other, problem, tmp_path):
    raw = (GOLDEN / "torch_legacy.pt").read_bytes()
    (found,) = SHARED.finditer(raw)
    changed = found[0].replace(part, other, 1)
    assert changed != found[0]
    outcome = _outcome(tmp_path / "view.pt", raw[: found.start()] + changed + raw[found.end() :])
    assert outcome is None if problem is None else problem in (outcome or "")


def _rewritten(path, change=lambda name, content: (name, content), **options) -> bytes:
    """torch_zip.pt, packed again by `zipfile`."""
    with (
        zipfile.ZipFile(GOLDEN / "torch_zip.pt") as old,
        zipfile.ZipFile(path, "w", **options) as new,
    ):
        for name in old.namelist():
            changed = change(name, old.read(name))
            if changed is not None:
                new.writestr(*changed)
    return path.read_bytes()


def test_an_archive_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    assert _outcome(path, _rewritten(path)) is None
    compressed = _rewritten(path, compression=zipfile.ZIP_DEFLATED)
    assert "is compressed" in (_outcome(path, compressed) or "")

    def without(end):
        return _rewritten(
            path, lambda name, content: None if name.endswith(end) else (name, content)
        )

    assert "0 entries NAME/data.pkl" in (_outcome(path, without("data.pkl")) or "")
    assert "lacks 1 of its" in (_outcome(path, without("data/3")) or "")
    big = _rewritten(
        path, lambda name, content: (name, b"big" if name.endswith("byteorder") else content)
    )
    assert "written big-endian" in (_outcome(path, big) or "")
    short = _rewritten(
        path, lambda name, content: (name, content[:-1] if name.endswith("data/0") else content)
    )
    assert re.search(r"storage '0', float64\[6\], ends at byte", _outcome(path, short) or "")
    attack = _rewritten(
        path,
        lambda name, content: (
            name,
            b"\x80\x02cos\nsystem\n." if name.endswith("data.pkl") else content,
        ),
    )
    assert "the global 'os.system'" in (_outcome(path, attack) or "")


def test_other_files_are_called_what_they_are(tmp_path):
    path = tmp_path / "other.pt"
    with pytest.raises(FileNotFoundError):
        open_torch(path)
    assert "is empty" in (_outcome(path, b"") or "")
    assert "neither a zip archive nor a pickle" in (_outcome(path, b"GGUF....") or "")
    plain = b"\x80\x02K\x07."
    assert "a pickle without PyTorch's magic number" in (_outcome(path, plain) or "")
    header = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    assert "big-endian" in (_outcome(path, header + b"\x80\x02}.") or "")
    small = header + b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
    assert "holds a NoneType" in (_outcome(path, small + b"\x80\x02N.\x80\x02].") or "")
    assert "does not list its storages" in (_outcome(path, small + b"\x80\x02}.\x80\x02N.") or "")
    strange = small + b"\x80\x02}.\x80\x02]X\x01\x00\x00\x000a." + struct.pack("<q", 1)
    assert "storage '0' belongs to no tensor" in (_outcome(path, strange) or "")
