"""Text to ids and back: byte-level BPE of a GGUF, tokenizer.json, and our own file."""

import gzip
import json

import pytest

from jaxquant.checkpoint import (
    CheckpointError,
    open_gguf,
    Tokenizer,
    tokenizer_from_gguf,
    tokenizer_from_huggingface,
)

# What byte-level BPE writes for each byte (GPT-2, `bytes_to_unicode`).
_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [byte for byte in range(256) if byte not in _KEPT]
BYTES = [chr(byte) for byte in _KEPT] + [chr(256 + i) for i in range(len(_MOVED))]
SPACE = chr(256 + _MOVED.index(32))
TOKENS = ["<|end|>", *BYTES, "th", "the", "12", "123", SPACE + "the", "<think>"]


def _metadata(**changes):
    good = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, *[1] * (len(TOKENS) - 2), 4],
        "tokenizer.ggml.merges": ["t h", "th e", "1 2", "12 3", SPACE + " the"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return {
        key: value
        for key, value in (good | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}).items()
        if value is not None
    }


def _pieces(tokenizer, text):
    return [TOKENS[token] for token in tokenizer.encode(text)]


TEXTS = ["the the 1234", "größer\n\n  als 東京 🙂", "<|end|>the<think>\t", "", " a  b   c\r\n"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_undoes_encoding(pre, text):
    tokenizer = tokenizer_from_gguf(_metadata(pre=pre))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4"]),  # Each digit by itself.
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["123", "4"]),
        ("llama-bpe", ["123", "4"]),  # Three at a time.
    ],
)
def test_digits_are_split_as_the_model_was_trained(pre, pieces):
    assert _pieces(tokenizer_from_gguf(_metadata(pre=pre)), "1234") == pieces


def test_special_tokens_are_one_token_and_no_others_are_added():
    tokenizer = tokenizer_from_gguf(_metadata())
    assert _pieces(tokenizer, "the<|end|> the<think>") == [
        "the",
        "<|end|>",
        SPACE + "the",
        "<think>",
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 0)
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": "llama"}, "a tokenizer of kind 'llama'"),
        ({"pre": "deepseek-llm"}, "the way 'deepseek-llm'; known are gpt-2, llama-bpe, qwen2, sm"),
        ({"pre": None}, "the way 'default'"),
        ({"tokens": None}, "tokens is no list of strings"),
        ({"tokens": ["a", 3]}, "tokens is no list of strings"),
        ({"tokens": ["a", "a"]}, "lists 2 tokens, 1 of them different"),
        ({"merges": ["t h e"]}, "merges 't h e', whose parts"),
        ({"merges": ["q q"]}, "merges 'q q', whose parts"),
        ({"token_type": [1]}, "token types for another number"),
        ({"eos_token_id": 10**6}, "eos token is 1000000"),
    ],
)
def test_metadata_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(_metadata(**changes))


def test_saving_and_loading_changes_nothing(tmp_path):
    tokenizer = tokenizer_from_gguf(_metadata())
    path = tokenizer.save(tmp_path)
    assert path == tmp_path / "tokenizer.json.gz"
    first = path.read_bytes()
    loaded = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.bos_id, loaded.chat_template) == (0, "{{ messages }}")
    loaded.save(tmp_path)
    assert path.read_bytes() == first


def test_a_damaged_file_is_refused(tmp_path):
    path = tokenizer_from_gguf(_metadata()).save(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(len(whole) // 20, 1)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="tokenizer.json.gz"):
            Tokenizer.load(tmp_path)
    for place in range(10, len(whole), max(len(whole) // 20, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="tokenizer.json.gz"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"tokenizer": 3, "bos_id": 0, "eos_id": 0, "chat_template": ""}']
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(CheckpointError, match="tokenizer.json.gz"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json.gz is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("end", ["<|end|>", {"content": "<|end|>"}])
def test_a_hugging_face_folder_gives_the_same(tmp_path, end):
    ours = tokenizer_from_gguf(_metadata())
    (tmp_path / "tokenizer.json").write_text(ours.inner.to_str())
    settings = {"eos_token": end, "bos_token": None, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = tokenizer_from_huggingface(tmp_path)
    assert theirs.encode("the 12 <|end|>") == ours.encode("the 12 <|end|>")
    assert (theirs.bos_id, theirs.eos_id, theirs.chat_template) == (None, 0, "{{ x }}")
    (tmp_path / "chat_template.jinja").write_text("{{ y }}")
    assert tokenizer_from_huggingface(tmp_path).chat_template == "{{ y }}"


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json is missing"):
        tokenizer_from_huggingface(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        tokenizer_from_huggingface(tmp_path)


@pytest.mark.registry
def test_the_tokenizer_of_smollm2(smollm2_gguf, tmp_path):
    tokenizer = tokenizer_from_gguf(open_gguf(smollm2_gguf).metadata)
    text = "In 1984 the <|im_start|>größte city\n\n\thad 東京 and 31.5% of it."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.count(1) == 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert "<|im_start|>" in tokenizer.chat_template
    # A checkpoint folder may be 3% larger than its packed weights, which are at least 67 MB.
    assert tokenizer.save(tmp_path).stat().st_size < 600_000
