"""What is known of a model without running it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pyro_em.tracing.sites import signature_of


def names(model: Any) -> list[str]:
    return [
        f"{p.name}={p.default!r}" if p.default is not p.empty else p.name
        for p in signature_of(model)
    ]


def test_the_parameters_of_a_function_are_those_that_it_has_now() -> None:
    def model(x: Any, k: int = 3) -> None: ...

    def other(y: Any) -> None: ...

    assert names(model) == names(model) == ["x", "k=3"]
    model.__defaults__ = (4,)
    assert names(model) == ["x", "k=4"]
    model.__code__, model.__defaults__ = other.__code__, None
    assert names(model) == ["y"]


def test_what_stands_for_another_function_has_its_parameters() -> None:
    def model(x: Any, k: int = 3) -> None: ...

    @functools.wraps(model)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        model(*args, **kwargs)

    class Net(torch.nn.Module):
        def forward(self, x: Any) -> None: ...

    assert names(wrapped) == names(model)
    assert names(functools.partial(model, k=2)) == ["x", "k=2"]
    assert names(Net()) == ["x"]
    signature_of(model).clear()
    assert names(model) == ["x", "k=3"]
