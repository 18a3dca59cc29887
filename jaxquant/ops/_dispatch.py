"""The first backend that does not refuse. Refusals carry reasons; nothing falls back in silence."""

from collections.abc import Callable, Mapping
from typing import Any


class Refusal(NotImplementedError):
    """A backend that was named cannot run this call, or none can; the message says why."""


def first_willing(
    op: str,
    backends: Mapping[str, Any],
    refuses: Callable[[Any], str | None],
    named: str | None,
) -> tuple[str, dict[str, str]]:
    """The name of the backend to run, and why each one before it refused.

    **Raises:** `ValueError` for an unknown name; `Refusal` if the named backend, or every one,
    refuses.
    """
    if named is not None:
        if named not in backends:
            raise ValueError(f"{op} has no backend named {named!r}. It has: {', '.join(backends)}.")
        reason = refuses(backends[named])
        if reason is not None:
            raise Refusal(f"The backend {named!r} of {op} refuses: {reason}.")
        return named, {}
    reasons: dict[str, str] = {}
    for name, backend in backends.items():
        reason = refuses(backend)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise Refusal(f"No backend of {op} takes this call. {listed}.")
