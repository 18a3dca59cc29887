"""`einsum` on top of `dot_general`, pair after pair."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ...qarray import QArray
from ..dot import dot_general
from ..dot._call import Operand


def einsum(subscripts: str, *operands: Operand, backend: str | None = None) -> Float[Array, "..."]:
    """`jnp.einsum(subscripts, *operands)` with explicit output, e.g. `bk,kn->bn`.

    Two operands or more, contracted from left to right: the first with the second, their product
    with the third, and so on. An axis is summed as soon as nothing after reads it. So the order in
    which they are written is the order of the work: a QArray is multiplied as codes with all that
    stands before it, and `bd,df,fh->bh` never multiplies the two weights with each other, as
    `df,fh,bd->bh` does. A pair of plain arrays is multiplied by `jax.lax.dot_general`.

    **Raises:** `ValueError` for subscripts that are not of that kind: an ellipsis, a letter twice
    in one operand, a letter that is summed in one operand alone, or a letter of two lengths.
    """
    parts, out = parse(subscripts, [len(x.shape) for x in operands])
    _check_lengths(subscripts, parts, operands)
    product, have = operands[0], parts[0]
    for i in range(1, len(parts)):
        needed = set(out).union(*parts[i + 1 :])
        product, have = _pair(product, have, operands[i], parts[i], needed, backend)
    assert not isinstance(product, QArray)
    return product.transpose([have.index(c) for c in out])


def _pair(
    lhs: Operand, left: str, rhs: Operand, right: str, needed: set[str], backend: str | None
) -> tuple[Array, str]:
    """The product of two operands and its letters; shared letters not `needed` are summed."""
    contracted = [c for c in left if c in right and c not in needed]
    batch = [c for c in left if c in right and c in needed]
    numbers = (
        (tuple(map(left.index, contracted)), tuple(map(right.index, contracted))),
        (tuple(map(left.index, batch)), tuple(map(right.index, batch))),
    )
    have = [*batch, *(c for c in left if c not in right), *(c for c in right if c not in left)]
    if isinstance(lhs, QArray) or isinstance(rhs, QArray):
        return dot_general(lhs, rhs, numbers, backend=backend), "".join(have)
    dtype: Any = jnp.promote_types(lhs.dtype, rhs.dtype)
    return lax.dot_general(lhs.astype(dtype), rhs.astype(dtype), numbers), "".join(have)


def parse(subscripts: str, ndims: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result."""
    inputs, arrow, out = subscripts.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) < 2 or not ("".join(parts) + out).isalpha():
        raise ValueError(
            f"einsum takes two operands or more and an explicit result, such as 'bk,kn->bn'; "
            f"got {subscripts!r}."
        )
    if len(parts) != len(ndims):
        raise ValueError(f"{subscripts!r} names {len(parts)} operands; {len(ndims)} were given.")
    for i, (part, ndim) in enumerate(zip(parts, ndims, strict=True)):
        if len(part) != ndim:
            raise ValueError(
                f"{subscripts!r} names {len(part)} axes of operand {i}, which has {ndim}."
            )
    for part in (*parts, out):
        if len(set(part)) != len(part):
            raise ValueError(
                f"{subscripts!r} names an axis twice in {part!r}; take a diagonal first."
            )
    letters = "".join(parts)
    alone = {c for c in letters if letters.count(c) == 1 and c not in out}
    unknown = set(out) - set(letters)
    if alone or unknown:
        raise ValueError(
            f"In {subscripts!r}, {sorted(alone | unknown)} stand in one place only. Sum those axes "
            "before, and name each axis of the result in an operand."
        )
    return parts, out


def _check_lengths(subscripts: str, parts: list[str], operands: tuple[Operand, ...]) -> None:
    known: dict[str, int] = {}
    for part, operand in zip(parts, operands, strict=True):
        for letter, n in zip(part, operand.shape, strict=True):
            if known.setdefault(letter, n) != n:
                raise ValueError(
                    f"In {subscripts!r}, {letter!r} is {known[letter]} long in one operand and {n} "
                    "in another. Axes of length 1 are not spread: drop them first."
                )
