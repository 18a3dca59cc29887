"""`einsum` on top of `dot_general`."""

from jaxtyping import Array, Float

from ..dot import dot_general
from ..dot._call import Operand


def einsum(
    subscripts: str, lhs: Operand, rhs: Operand, *, backend: str | None = None
) -> Float[Array, "..."]:
    """`jnp.einsum(subscripts, lhs, rhs)` for two operands with explicit output, e.g. `bk,kn->bn`.

    **Raises:** `ValueError` for subscripts that are not of that kind: an ellipsis, a letter twice
    in one operand, or a letter that is summed in one operand alone.
    """
    left, right, out = parse(subscripts, len(lhs.shape), len(rhs.shape))
    contracted = [c for c in left if c in right and c not in out]
    batch = [c for c in left if c in right and c in out]
    numbers = (
        (tuple(map(left.index, contracted)), tuple(map(right.index, contracted))),
        (tuple(map(left.index, batch)), tuple(map(right.index, batch))),
    )
    y = dot_general(lhs, rhs, numbers, backend=backend)
    have = [*batch, *(c for c in left if c not in right), *(c for c in right if c not in left)]
    return y.transpose([have.index(c) for c in out])


def parse(subscripts: str, left_ndim: int, right_ndim: int) -> tuple[str, str, str]:
    """The letters of both operands and of the result."""
    inputs, arrow, out = subscripts.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    letters = left + right + out
    if not arrow or not comma or "," in right or not letters.isalpha():
        raise ValueError(
            f"einsum takes two operands and an explicit result, such as 'bk,kn->bn'; "
            f"got {subscripts!r}."
        )
    for name, part, ndim in (("first", left, left_ndim), ("second", right, right_ndim)):
        if len(part) != ndim:
            raise ValueError(
                f"{subscripts!r} names {len(part)} axes of the {name} operand, which has {ndim}."
            )
    for part in (left, right, out):
        if len(set(part)) != len(part):
            raise ValueError(
                f"{subscripts!r} names an axis twice in {part!r}; take a diagonal first."
            )
    alone = {c for c in left + right if (c in left) != (c in right) and c not in out}
    unknown = set(out) - set(left + right)
    if alone or unknown:
        raise ValueError(
            f"In {subscripts!r}, {sorted(alone | unknown)} stand in one place only. Sum those axes "
            "before, and name each axis of the result in an operand."
        )
    return left, right, out
