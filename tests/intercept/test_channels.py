import hypothesis
import numpy as np
from hypothesis import strategies as st

from jaxquant.intercept._channels import Book, compressed, FREE, free, reshaped, ZERO


def test_a_book_tells_which_are_tied_and_which_are_fixed():
    book = Book()
    a, b, c = book.new((3,)), book.new((3,)), book.new((3,))
    assert len(book) == 9
    book.tie(a, b)
    book.tie(b[:1], c[:1])
    np.testing.assert_array_equal(book.resolve(b), book.resolve(a))
    assert book.resolve(c)[0] == book.resolve(a)[0]
    assert len({*book.resolve(np.concatenate([a, b, c]))}) == 5
    book.fix(c[:1])
    np.testing.assert_array_equal(book.resolve(a) == FREE, [True, False, False])
    # What was fixed already, and zeros, are left alone.
    np.testing.assert_array_equal(book.resolve(np.asarray([FREE, ZERO], np.int32)), [FREE, ZERO])


@hypothesis.given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_tying_is_an_equivalence(pairs):
    book = Book()
    ids = book.new((10,))
    first, second = (np.asarray([p[i] for p in pairs], np.int32) for i in (0, 1))
    book.tie(first, second)
    together = np.eye(10, dtype=bool)
    for a, b in pairs:
        together[a, b] = together[b, a] = True
    for k in range(10):
        together |= together[:, k : k + 1] & together[k : k + 1]
    found = book.resolve(ids)
    np.testing.assert_array_equal(found[:, None] == found[None], together)


def test_a_sum_fixes_what_does_not_agree():
    book = Book()
    a, b = book.new((4,)), book.new((4,))
    left = np.asarray([a[0], a[1], ZERO, a[3]], np.int32)
    right = np.asarray([a[0], FREE, b[2], b[3]], np.int32)
    met = book.meet(left, right, tie=False)
    np.testing.assert_array_equal(met, [a[0], FREE, b[2], FREE])
    assert (book.resolve(np.asarray([a[1], a[3], b[3]], np.int32)) == FREE).all()


def test_a_sum_ties_where_it_may():
    book = Book()
    a, b = book.new((4,)), book.new((1,))
    met = book.meet(a, b, tie=True)
    assert len({*met}) == 1 and met[0] >= 0
    np.testing.assert_array_equal(book.resolve(b), met[:1])


def test_experts_share_what_is_tied_to_something_shared():
    book = Book()
    a, b = book.new((3,), sizes=7), book.new((2,))
    np.testing.assert_array_equal(book.sizes(a), [7, 7, 7])
    book.tie(a[:1], b[:1])
    book.share(a[1:2])
    np.testing.assert_array_equal(book.sizes(a), [-1, -1, 7])


def test_reshaping_keeps_length_one_where_nothing_varies():
    channels = np.arange(6, dtype=np.int32).reshape(1, 1, 6)
    out = reshaped(channels, (2, 5, 6), (10, 2, 3))
    np.testing.assert_array_equal(out, np.arange(6).reshape(1, 2, 3))
    back = reshaped(out, (10, 2, 3), (2, 5, 6))
    np.testing.assert_array_equal(back, channels)


def test_reshaping_agrees_with_reshaping_in_full():
    rng = np.random.default_rng(0)
    for old, new in [((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)), ((4, 1, 6), (2, 2, 6, 1))]:
        sizes = [n if rng.random() < 0.5 else 1 for n in old]
        channels = rng.integers(0, 5, sizes).astype(np.int32)
        whole = np.broadcast_to(channels, old).reshape(new)
        np.testing.assert_array_equal(np.broadcast_to(reshaped(channels, old, new), new), whole)


def test_compressed_drops_repetition():
    channels = np.broadcast_to(np.arange(3, dtype=np.int32)[:, None], (2, 3, 4))
    assert compressed(channels).shape == (1, 3, 1)
    assert free(3).shape == (1, 1, 1)
