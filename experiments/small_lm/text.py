"""Text as tokens: books apart, a tokenizer of the training books, windows of the held-out ones."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxquant.checkpoint import Tokenizer
from jaxquant.evaluate import windows_of_text

from .settings import Text

END = "<|endoftext|>"
HEADING = re.compile(r"^((?:[1-3] )?[A-Z][A-Za-z ]*) \d+$", re.MULTILINE)
"""`1 Samuel 3`, on a line of its own, above each chapter."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens of the training books, one row, and windows `[windows, length]` of the others."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes_per_token: float
    books: tuple[str, ...]
    sha256: str

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells this corpus from others."""
        vocabulary = self.tokenizer.inner.to_str().encode()
        return {
            "text": self.sha256[:16],
            "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
            "train_tokens": len(self.train),
            "held_out": str(self.held_out.shape),
        }


def books_of(text: str) -> dict[str, str]:
    """The books of a text by their names, in their order.

    **Raises:** `ValueError` if no line is a heading such as `Genesis 1`.
    """
    found = list(HEADING.finditer(text))
    starts = [m for i, m in enumerate(found) if i == 0 or m[1] != found[i - 1][1]]
    if not starts:
        raise ValueError(
            "The text has no line such as `Genesis 1`, by which books are told apart. Make it as "
            "experiments/small_lm/README.md says."
        )
    ends = [m.start() for m in starts[1:]] + [len(text)]
    return {m[1]: text[m.start() : end].strip() for m, end in zip(starts, ends, strict=True)}


def make_corpus(text: str, settings: Text, held_out: Sequence[str] | None = None) -> Corpus:
    """The corpus of a text; `held_out` in place of the settings' books.

    **Raises:** `ValueError` if a book is not there, or if too little is left to train on.
    """
    books = books_of(text)
    names = tuple(settings.held_out if held_out is None else held_out)
    if missing := [name for name in names if name not in books]:
        raise ValueError(
            f"The text has no book {', '.join(missing)} to hold out; it has {', '.join(books)}. "
            "Give --held-out other books, or --text the whole Bible."
        )
    training = [book for name, book in books.items() if name not in names]
    if not training:
        raise ValueError(
            f"All books of the text are held out ({', '.join(names)}). Give --held-out fewer, or "
            "--text the whole Bible."
        )
    tokenizer = train_tokenizer(training, settings.vocabulary)
    train = [id for book in training for id in (*tokenizer.encode(book), tokenizer.eos_id)]
    unseen = "\n\n".join(books[name] for name in names)
    windows = windows_of_text(unseen, tokenizer.encode, settings.length)[: settings.windows]
    scored = tokenizer.decode(windows.reshape(-1).tolist())
    return Corpus(
        tokenizer=tokenizer,
        train=np.array(train, np.int32),
        held_out=windows,
        held_out_bytes_per_token=len(scored.encode()) / windows.size,
        books=names,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def train_tokenizer(books: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, of at most `vocabulary` tokens; the first is `END`."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator((line for book in books for line in book.splitlines()), trainer)
    end = inner.token_to_id(END)
    return Tokenizer(inner=inner, bos_id=end, eos_id=end)


def whole_bible(printed: str) -> str:
    """The text as `bible -l80 'gen1:1-rev22:21'` prints it, a verse a line, without numbers.

    Debian's program breaks lines, indents each verse by two spaces and its number, and puts empty
    lines around headings.
    """
    verses: list[str] = []
    for line in printed.splitlines():
        if numbered := re.match(r"  \d+ (.*)", line):
            verses.append(numbered[1])
        elif HEADING.fullmatch(line):
            verses += ["", line]
        elif line.strip():
            verses[-1] = f"{verses[-1]} {line.strip()}"
    return "\n".join(verses) + "\n"


def main() -> None:
    """Reads what `bible` printed from the standard input, and writes the text to a file."""
    import sys

    Path(sys.argv[1]).write_text(whole_bible(sys.stdin.read()), encoding="utf-8")


if __name__ == "__main__":
    main()
