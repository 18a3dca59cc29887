"""By what each product of a call is computed: noted while a plan is made."""

from typing import Any

import jax

from ..ops import choose_backend, preferred_backend
from ..ops.dot import layout_for, make_call
from ..qarray import QArray, relayout


class Choices:
    """The backend of each site, on the device in force, and why not the device's first choice."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str | None]] = {}

    @property
    def rows(self) -> tuple[tuple[str, str, str | None], ...]:
        return tuple((site, *found) for site, found in self._found.items())

    def note(
        self,
        site: str,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        named: str | None,
        **settings: Any,
    ) -> None:
        """Notes what computes a product whose weights `jaxquant.prepare` has stored."""
        first = named or preferred_backend()
        left, right = (
            _prepared(x, summed, first) if isinstance(x, QArray) else x
            for x, summed in zip((lhs, rhs), dimension_numbers[0], strict=True)
        )
        name, reasons = choose_backend(make_call(left, right, dimension_numbers, **settings), named)
        self._found.setdefault(site, (name, reasons.get(first)))


def _prepared(q: QArray, contracted: Any, backend: str) -> QArray:
    layout = layout_for(backend, q, tuple(contracted), ())
    return jax.eval_shape(lambda q: relayout(q, layout), q)
