"""A trail notices all that changes what names stand for: names looked up anew are its oracle."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyro_em.tracing.names import Trail, names_of

LEVEL = [1.0, torch.zeros(2)]
OTHER = {"a": torch.ones(1)}
RATE = 0.5


def called(x: Any) -> Any:
    return x * OTHER["a"]


class Holder:
    def __init__(self) -> None:
        self.scale, self.parts = 2.0, {"b": [1.0]}

    def __call__(self, x: Any, more: Any = None) -> Any:
        return x * self.scale


def closing() -> Callable[..., Any]:
    bound = {"n": 3}
    size = torch.ones(1)

    def model(x: Any, more: Any = None, power: float = 2.0) -> Any:
        return called(x) * LEVEL[0] * RATE * bound["n"] * size

    def rebind(value: Any) -> None:
        nonlocal size
        size = value

    model.rebind, model.bound = rebind, bound  # type: ignore[attr-defined]
    return model


def rebinds(model: Any, more: Any) -> None:
    model.rebind(torch.ones(1))


def grows(model: Any, more: Any) -> None:
    model.bound["m"] = 1


def replaces(model: Any, more: Any) -> None:
    LEVEL[1] = torch.zeros(2)


def deep(model: Any, more: Any) -> None:
    more["deep"].append(2)


def other_default(model: Any, more: Any) -> None:
    model.__defaults__ = (None, 3.0)


def of_another(model: Any, more: Any) -> None:
    OTHER["a"] = torch.ones(1)


def rate(model: Any, more: Any) -> None:
    globals()["RATE"] = 0.25


@pytest.mark.parametrize(
    "change", [rebinds, grows, replaces, deep, other_default, of_another, rate]
)
def test_what_changes_names_is_seen(change: Callable[..., None], monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "LEVEL", list(LEVEL))
    monkeypatch.setitem(globals(), "OTHER", dict(OTHER))
    monkeypatch.setitem(globals(), "RATE", RATE)
    model, more = closing(), {"deep": [1]}
    args, trail = (torch.ones(1), more), Trail()
    before = names_of(model, args, {}, trail)
    assert trail.is_whole and trail.is_unchanged()
    change(model, more)
    assert not trail.is_unchanged()
    after = names_of(model, args, {})
    assert before.keys() != after.keys() or any(before[n] is not after[n] for n in before)


@pytest.mark.parametrize("what", ["scale", "parts", "new"])
def test_attributes_of_objects_are_seen(what: str) -> None:
    holder, trail = Holder(), Trail()
    names_of(holder, (1.0,), {}, trail)
    assert trail.is_whole and trail.is_unchanged()
    if what == "parts":
        holder.parts["b"][0] = 2.0
    else:
        setattr(holder, what, 3.0)
    assert not trail.is_unchanged()


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), functools.partial(called, 1.0)])
def test_what_is_not_followed_is_looked_up_anew(model: Any) -> None:
    trail = Trail()
    names_of(model, (), {}, trail)
    assert not trail.is_unchanged()


def test_a_function_with_other_code_is_another() -> None:
    model = types.FunctionType(called.__code__, {"OTHER": OTHER})
    trail = Trail()
    names_of(model, (), {}, trail)
    assert trail.is_unchanged()
    model.__code__ = rate.__code__
    assert not trail.is_unchanged()
