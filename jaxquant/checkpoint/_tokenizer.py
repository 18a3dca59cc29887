"""Text to token ids and back, as the model's file says."""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, Regex

from ._errors import CheckpointError
from ._huggingface import read_json

_FILE = "tokenizer.json.gz"
# Of JSON: ten times the largest tokenizer seen. A damaged or hostile file stops here.
_MOST_BYTES = 1 << 28
_CONTROL = 3  # llama.cpp's token type of <|im_start|> and the like
_USER_DEFINED = 4
# The splitting patterns are those of the models' own tokenizer.json; llama.cpp names them in
# `tokenizer.ggml.pre`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer of the package `tokenizers`, with the ids and the template that go with it."""

    inner: tokenizers.Tokenizer
    bos_id: int | None = None  # `None`: the file names none.
    eos_id: int | None = None
    chat_template: str | None = None  # Jinja source; kept, never run.

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens in it are recognized; none are added at its ends."""
        return list(self.inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json.gz` into `folder` (the same bytes each time); returns its path."""
        content = {
            "tokenizer": json.loads(self.inner.to_str()),
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "chat_template": self.chat_template,
        }
        path = Path(folder) / _FILE
        raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        path.write_bytes(gzip.compress(raw, mtime=0))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """What `save` wrote into `folder`.

        Raises:
          CheckpointError: the file is missing or damaged.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Save the tokenizer with the model.")
        try:
            with gzip.open(path) as file:
                raw = file.read(_MOST_BYTES + 1)
            if len(raw) > _MOST_BYTES:
                raise CheckpointError(
                    f"{path} unpacks to more than {_MOST_BYTES} bytes, which no tokenizer does."
                )
            content = json.loads(raw)
        # zlib.error is neither an OSError nor a ValueError; gzip lets it through for damaged
        # streams.
        except (OSError, EOFError, ValueError, zlib.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} cannot be read ({error}). Save the tokenizer again."
            ) from None
        if not isinstance(content, dict) or set(content) != {
            "tokenizer",
            "bos_id",
            "eos_id",
            "chat_template",
        }:
            raise CheckpointError(
                f"{path} does not hold what Tokenizer.save writes. Save the tokenizer again."
            )
        inner = _parse(json.dumps(content.pop("tokenizer")), path)
        return cls(inner=inner, **content)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata: byte-level BPE with a known way of splitting.

    Raises:
      CheckpointError: there is none, it is of another kind, or its parts do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        found = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}"
        raise CheckpointError(
            f"The GGUF file has {found}; byte-level BPE ('gpt2') can be read. "
            f"Give token ids, or a Hugging Face folder with tokenizer.json."
        )
    pre = metadata.get("tokenizer.ggml.pre", "default")
    splits = _splitters()
    if pre not in splits:
        raise CheckpointError(
            f"The GGUF file splits text the way {pre!r}; known are {', '.join(sorted(splits))}. "
            f"Give token ids, or a Hugging Face folder with tokenizer.json."
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(
            f"The GGUF file lists {len(tokens)} tokens, {len(vocab)} of them different. Fetch it "
            f"again."
        )
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not {merge[0], merge[1], "".join(merge)} <= vocab.keys():
            raise CheckpointError(
                f"The GGUF file merges {' '.join(merge)!r}, whose parts or whole are no tokens. "
                f"Fetch the file again."
            )
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab, [(merge[0], merge[1]) for merge in merges], ignore_merges=pre == "llama-bpe"
        )
    )
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = splits[pre]
    inner.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(
            f"The GGUF file has {len(tokens)} tokens and token types for another number. Fetch it "
            f"again."
        )
    typed = list(zip(tokens, types, strict=True))
    inner.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, t in typed if t == _CONTROL]
    )
    inner.add_tokens(
        [AddedToken(token, normalized=False) for token, t in typed if t == _USER_DEFINED]
    )
    return Tokenizer(
        inner=inner,
        bos_id=_token_id(metadata.get("tokenizer.ggml.bos_token_id"), len(tokens), "bos"),
        eos_id=_token_id(metadata.get("tokenizer.ggml.eos_token_id"), len(tokens), "eos"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def tokenizer_from_huggingface(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with tokenizer_config.json where
    there is one.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Give token ids, or fetch the folder again.")
    inner = _parse(path.read_text(encoding="utf-8", errors="replace"), path)
    beside = folder / "tokenizer_config.json"
    settings = read_json(beside) if beside.is_file() else {}

    def named(key: str) -> int | None:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return inner.token_to_id(token) if isinstance(token, str) else None

    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    return Tokenizer(
        inner=inner,
        bos_id=named("bos_token"),
        eos_id=named("eos_token"),
        chat_template=template if isinstance(template, str) else None,
    )


def _splitters() -> dict[str, pre_tokenizers.PreTokenizer]:
    def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return {
        "gpt-2": gpt2,
        "smollm": digits,
        "llama-bpe": by_pattern(_LLAMA3),
        "qwen2": by_pattern(_QWEN2),
    }


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"The GGUF file's {key} is no list of strings. Fetch the file again.")
    return value


def _token_id(value: Any, count: int, what: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise CheckpointError(
            f"The GGUF file's {what} token is {value!r}, and it has {count} tokens. Fetch the "
            f"file again."
        )
    return value


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    # The package raises bare `Exception` for text that is no tokenizer; there is nothing narrower
    # to name.
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"{path} is not a tokenizer ({error}). Fetch it again.") from None
