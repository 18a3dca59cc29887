"""A pickle of tensors is followed; one that asks for anything else is refused by name, unexecuted.

The programs are written instruction by instruction, as an attacker would write them.
"""

import mmap
import os

import pytest

from jaxquant.checkpoint import CheckpointError
from jaxquant.checkpoint._torch_pickle import read_pickle, Storage, View

PROTO, STOP = b"\x80\x02", b"."


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _read(raw: bytes):
    with mmap.mmap(-1, max(len(raw), 1)) as mapped:
        mapped.write(raw)
        return read_pickle(mapped, 0, len(raw), "some.pt")


def _refused(raw: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        _read(raw)
    message = str(caught.value)
    assert message.startswith("some.pt") and "\n" not in message and len(message) < 400
    return message


STORAGE = (
    b"("
    + _text("storage")
    + _global("torch", "FloatStorage")
    + _text("0")
    + _text("cpu")
    + b"K\x06tQ"
)
# Storage, offset 1, shape (2,), strides (2,), requires_grad, hooks.
TENSOR = (
    _global("torch._utils", "_rebuild_tensor_v2")
    + b"("
    + STORAGE
    + b"K\x01K\x02\x85K\x02\x85\x89"
    + _global("collections", "OrderedDict")
    + b")RtR"
)


def test_scalars_and_containers_are_read():
    raw = PROTO + b"}(" + _text("a") + b"(K\x01K\x02K\x03t" + _text("b") + b"]NaK\x07]"
    raw += b"(\x88\x89G?\xf8\x00\x00\x00\x00\x00\x00eu" + STOP
    value, end = _read(raw + b"more")
    assert value == {"a": (1, 2, 3), "b": [None], 7: [True, False, 1.5]} and end == len(raw)


def test_a_tensor_is_a_view_of_a_storage():
    view, _ = _read(PROTO + TENSOR + STOP)
    assert isinstance(view, View) and isinstance(view.storage, Storage)
    assert (view.offset, view.shape, view.strides) == (1, (2,), (2,))
    assert (view.storage.key, view.storage.dtype.name, view.storage.count) == ("0", "float32", 6)


def test_the_state_of_a_dict_is_left_alone():
    raw = PROTO + _global("collections", "OrderedDict") + b")R"
    raw += b"}" + _text("_metadata") + b"}sb" + STOP
    assert _read(raw)[0] == {}


COMMAND = _text("touch executed") + b"\x85R"
ATTACKS = {
    "os.system": (PROTO + _global("os", "system") + COMMAND, "byte 2 for the global 'os.system'"),
    "posix": (PROTO + b"N0" + STOP, "the instruction POP"),
    "eval": (
        PROTO + _global("builtins", "eval") + _text("1") + b"\x85R",
        "global 'builtins.eval'",
    ),
    "python 2": (PROTO + _global("__builtin__", "eval") + b")R", "global '__builtin__.eval'"),
    "by two strings": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
        "byte 14 for the global 'os.system'",
    ),
    "dotted": (
        b"\x80\x04" + _text("torch") + _text("serialization.os.system") + b"\x93.",
        "global 'torch.serialization.os.system'",
    ),
    "inst": (b"(" + _text("ls") + b"ios\nsystem\n.", "instruction INST ('os system')"),
    "obj": (b"(" + _global("collections", "OrderedDict") + b"o.", "the instruction OBJ"),
    "newobj": (
        PROTO + _global("collections", "OrderedDict") + b")\x81.",
        "the instruction NEWOBJ",
    ),
    "extension": (PROTO + b"\x82\x01.", "the instruction EXT1"),
    "setstate": (
        PROTO + TENSOR + b"}" + _text("__setstate__") + b"Nsb.",
        "state of an object to be set (BUILD)",
    ),
    "state of a list": (PROTO + b"]}b.", "state of an object to be set (BUILD)"),
    "state that is no dict": (PROTO + b"}" + TENSOR + b"b.", "to be set (BUILD)"),
    "call of a dict": (PROTO + b"})R.", "a call of a dict"),
    "call of what a call gave": (
        PROTO + _global("collections", "OrderedDict") + b")R)R.",
        "a call of a dict",
    ),
    "call of a storage": (
        PROTO + _global("torch", "FloatStorage") + b"K\x05\x85R.",
        "a call of torch.FloatStorage with 1 arguments",
    ),
    "dict of something": (
        PROTO + _global("collections", "OrderedDict") + b"]\x85R.",
        "a call of collections.OrderedDict with 1 arguments",
    ),
    "newer tensors": (
        PROTO + _global("torch._utils", "_rebuild_tensor_v3") + b".",
        "the global 'torch._utils._rebuild_tensor_v3'",
    ),
    "persistent module": (
        PROTO + b"(" + _text("module") + b"NNNNtQ.",
        "a persistent object that is no storage",
    ),
    "persistent text": (b"Pmodule\n.", "the instruction PERSID ('module')"),
    "storage of a function": (
        PROTO
        + b"("
        + _text("storage")
        + _global("collections", "OrderedDict")
        + _text("0")
        + b"NK\x01tQ.",
        "a storage of unknown type",
    ),
    "part of a storage": (
        PROTO
        + b"("
        + _text("storage")
        + _global("torch", "FloatStorage")
        + _text("0")
        + b"NK\x01)tQ.",
        "a storage that is part of another",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_anything_that_could_run_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw, named = ATTACKS[name]
    message = _refused(raw if raw.endswith(STOP) else raw + STOP)
    assert named in message and "Nothing was executed" in message
    assert os.listdir(tmp_path) == []


DAMAGED = {
    "a tuple of nothing": (PROTO + b"\x86.", "the stack is empty"),
    "nothing to return": (PROTO + b".", "the stack is empty"),
    "a mark to return": (PROTO + b"(.", "the stack is empty"),
    "no mark": (PROTO + b"Nt.", "there is no mark on the stack"),
    "an empty memo": (PROTO + b"h\x03.", "nothing was put under 3"),
    "nothing to put": (PROTO + b"q\x03.", "the stack is empty"),
    "a key without value": (PROTO + b"}(K\x01u.", "a key has no value"),
    "a key that is a list": (PROTO + b"}]Ns.", "a key is a list"),
    "items into a tuple": (PROTO + b")K\x01K\x02s.", "a dict was wanted"),
    "items into a dict": (PROTO + b"}K\x01a.", "a list was wanted"),
    "a global without a name": (PROTO + b"NN\x93.", "a global has no name"),
    "a huge number": (PROTO + b"\x8a\x20" + b"\x7f" * 32 + b".", "a number has 255 bits"),
    "a tensor of nothing": (
        PROTO + _global("torch._utils", "_rebuild_tensor_v2") + b"(NK\x00))\x89}tR.",
        "no storage or no offset",
    ),
    "a shape of texts": (
        PROTO
        + _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + STORAGE
        + b"K\x00"
        + _text("x")
        + b"\x85)\x89}tR.",
        "shape or strides are no tuple of integers",
    ),
    "a shape of truths": (
        PROTO
        + _global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + STORAGE
        + b"K\x00\x88\x85)\x89}tR.",
        "shape or strides are no tuple of integers",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_program_without_sense_is_a_damaged_file(name):
    raw, problem = DAMAGED[name]
    assert problem in _refused(raw)


@pytest.mark.parametrize(
    "text", [b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\x7f"]
)
def test_a_length_beyond_the_end_is_not_believed(text):
    assert "breaks off or is damaged" in _refused(PROTO + text + b"abc" + STOP)


def test_a_line_without_an_end_is_not_searched_forever():
    assert "breaks off or is damaged" in _refused(PROTO + b"c" + b"a" * 10_000 + b"\nb\n.")


def test_every_cut_of_a_program_is_one_clear_error():
    raw = PROTO + TENSOR + STOP
    for end in range(len(raw)):
        _refused(raw[:end])


def test_too_many_instructions_are_not_followed(monkeypatch):
    monkeypatch.setattr("jaxquant.checkpoint._torch_pickle._MOST_INSTRUCTIONS", 100)
    assert "more than 100 instructions" in _refused(PROTO + b"N" * 200 + STOP)


def test_a_value_that_holds_itself_is_read():
    value, _ = _read(PROTO + b"]q\x00h\x00a" + STOP)
    assert value[0] is value
