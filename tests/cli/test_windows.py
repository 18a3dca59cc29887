"""Text as a command line gives it: cut by the model's tokenizer, or refused with a way out."""

import pytest
import tiny_llama

from jaxquant.cli._windows import read_text, text_windows
from jaxquant.models import open_model


def test_text_becomes_windows_of_the_models_tokens(tmp_path, model):
    (tmp_path / "a.txt").write_text("x" * 30 + "y" * 20)
    opened = open_model(model)
    windows = text_windows(tmp_path / "a.txt", opened, 16, ids="ids")
    # One token a byte; the last two are left over.
    assert windows.shape == (3, 16)
    assert opened.tokenizer.decode(windows.ravel().tolist()) == "x" * 30 + "y" * 18


def test_what_is_no_text_names_what_to_give_in_its_place(tmp_path, model):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text .*at byte 3.*For token ids use --ids"):
        read_text(tmp_path / "a.txt", ids="--ids")
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="5 tokens, which do not fill one window of 16"):
        text_windows(tmp_path / "a.txt", open_model(model), 16, ids="--ids")
    silent = open_model(tiny_llama.write_folder(tmp_path / "silent", tokenizer=False))
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        text_windows(tmp_path / "a.txt", silent, 16, ids="--ids")
