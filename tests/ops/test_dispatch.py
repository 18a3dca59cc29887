import types

import pytest

from jaxquant.ops import Refusal
from jaxquant.ops._dispatch import first_willing

BACKENDS = {
    "fast": types.SimpleNamespace(reason="it is too late"),
    "other": types.SimpleNamespace(reason=None),
    "last": types.SimpleNamespace(reason=None),
}


def _ask(named: str | None = None, backends: dict = BACKENDS):
    return first_willing("sum", backends, lambda b: b.reason, named)


def test_the_first_that_does_not_refuse_is_taken_and_reasons_are_kept():
    assert _ask() == ("other", {"fast": "it is too late"})


def test_a_named_backend_is_taken_or_says_why_not():
    assert _ask("last") == ("last", {})
    with pytest.raises(Refusal, match="The backend 'fast' of sum refuses: it is too late"):
        _ask("fast")


def test_a_refusal_is_a_kind_of_not_implemented():
    assert issubclass(Refusal, NotImplementedError)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="sum has no backend named 'slow'. It has: fast, other, l"):
        _ask("slow")


def test_when_all_refuse_every_reason_is_given():
    none = {"fast": BACKENDS["fast"], "a": types.SimpleNamespace(reason="no")}
    with pytest.raises(Refusal, match="No backend of sum.* fast: it is too late; a: no"):
        _ask(backends=none)
