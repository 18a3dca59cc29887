"""Windows from files and from text; what is no such file is refused in a sentence."""

import io

import numpy as np
import pytest

from jaxquant.evaluate import read_tokens, windows_of_text


def list_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_text_is_cut_into_whole_windows_one_after_the_other():
    windows = windows_of_text("abcdefgh", list_bytes, 3)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert windows.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "length", "sentence"),
    [
        ("abc", 4, "has 3 tokens, which do not fill one window of 4"),
        ("", 2, "has 0 tokens"),
        ("abc", 1, "at least 2 tokens, not 1"),
    ],
)
def test_too_little_text_is_refused(text, length, sentence):
    with pytest.raises(ValueError, match=sentence):
        windows_of_text(text, list_bytes, length)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_an_array_of_ids_comes_back_as_it_was(tmp_path, dtype):
    ids = np.arange(12, dtype=dtype).reshape(3, 4)
    np.savez_compressed(tmp_path / "a.npz", tokens=ids, starts=np.zeros(3))
    np.testing.assert_array_equal(read_tokens(tmp_path / "a.npz"), ids)


def _npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WRONG = {
    "text": (lambda path: path.write_text("1 2 3"), "is no .npz file of plain arrays"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a cut archive": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "cannot be read"),
    "another name": (_npz(ids=np.zeros((2, 3), int)), "holds 'ids'. A .npz file with"),
    "no array": (_npz(), "holds no array"),
    "floats": (_npz(tokens=np.zeros((2, 3))), r"float64\[2, 3\]"),
    "one axis": (_npz(tokens=np.zeros(3, int)), r"int64\[3\]"),
    "objects": (_npz(tokens=np.array([{}], object)), "is no .npz file of plain arrays"),
    "one array": (lambda path: path.write_bytes(_npy(np.zeros((2, 3), int))), "a single array"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_files_are_refused(tmp_path, kind):
    write, sentence = WRONG[kind]
    path = tmp_path / "tokens.npz"
    write(path)
    with pytest.raises(ValueError, match=sentence) as raised:
        read_tokens(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_no_value_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tokens(tmp_path / "none.npz")
