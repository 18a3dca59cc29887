import pytest
from small_lm.settings import Text
from small_lm.text import books_of, make_corpus, whole_bible

PRINTED = """
Genesis 1

  1 In the beginning God created the heaven and the earth.
  2 And the earth was without form, and void; and darkness was upon the face of
the deep.

Genesis 2

  1 Thus the heavens and the earth were finished.

1 John 1

  1 That which was from the beginning.
"""
TEXT = whole_bible(PRINTED)
SETTINGS = Text(vocabulary=280, length=8, held_out=["1 John"], windows=2)


def test_a_verse_is_a_line_without_its_number():
    assert TEXT.splitlines() == [
        "",
        "Genesis 1",
        "In the beginning God created the heaven and the earth.",
        "And the earth was without form, and void; and darkness was upon the face of the deep.",
        "",
        "Genesis 2",
        "Thus the heavens and the earth were finished.",
        "",
        "1 John 1",
        "That which was from the beginning.",
    ]


def test_books_have_all_their_chapters():
    books = books_of(TEXT)
    assert list(books) == ["Genesis", "1 John"]
    assert books["Genesis"].count("\n") == 5 and books["1 John"].startswith("1 John 1\nThat")
    with pytest.raises(ValueError, match="no line such as `Genesis 1`"):
        books_of("In the beginning")


def test_what_is_held_out_is_neither_trained_on_nor_in_the_tokenizer():
    corpus = make_corpus(TEXT, SETTINGS)
    decode = corpus.tokenizer.decode
    assert decode(corpus.train.tolist()) == books_of(TEXT)["Genesis"] + "<|endoftext|>"
    assert corpus.held_out.shape == (2, 8)
    held = decode(corpus.held_out.reshape(-1).tolist())
    assert books_of(TEXT)["1 John"].startswith(held)
    assert corpus.held_out_bytes_per_token == len(held) / 16
    other = make_corpus(TEXT.replace("That which", "This which"), SETTINGS)
    assert other.tokenizer.inner.to_str() == corpus.tokenizer.inner.to_str()
    assert other.identity["text"] != corpus.identity["text"]


def test_books_that_are_not_there_or_all_are_refused():
    with pytest.raises(ValueError, match="no book Ruth to hold out; it has Genesis, 1 John"):
        make_corpus(TEXT, SETTINGS, ["Ruth"])
    with pytest.raises(ValueError, match="All books of the text are held out"):
        make_corpus(TEXT, SETTINGS, ["Genesis", "1 John"])
