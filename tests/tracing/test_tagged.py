"""Distributions of tagged tensors, against those that Pyro makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_em.graph.mixtures import components_of_mixture
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.provenance import Tagged, looking_at, tags_of
from pyro_em.tracing.sites import tensors_of
from pyro_em.tracing.tagged import TaggedDistributions

Make = Callable[[Any, Any], Any]

PLAIN: dict[str, Make] = {
    "probabilities": lambda a, b: dist.Categorical(a),
    "logits": lambda a, b: dist.Categorical(logits=a),
    "two latents": lambda a, b: dist.Normal(a, b),
    "a number": lambda a, b: dist.Normal(a, 2.0),
    "counts": lambda a, b: dist.Poisson(a),
    "reinterpreted": lambda a, b: dist.Normal(a, b).to_event(1),
}
ONE_BY_ONE: dict[str, Make] = {
    "some tensors alone": lambda a, b: dist.MultivariateNormal(a, torch.eye(3)),
    "a distribution inside": lambda a, b: dist.LogNormal(a, b),
    "transforms": lambda a, b: dist.Gumbel(a, b),
    "numbers that are read": lambda a, b: dist.Normal(a, b, validate_args=True),
    "whole tensors": lambda a, b: _Whole(a),
}


class _Whole(dist.Normal):
    def __init__(self, loc: Any) -> None:
        super().__init__(loc - loc.mean(), 1.0)


def made(make: Make, *, here: bool) -> tuple[list[Any], Mixing]:
    """Three distributions of a form, of other latents each."""
    mixing = Mixing({})
    block = TaggedDistributions(mixing).made_here() if here else looking_at(mixing)
    fns = []
    with pyro.validation_enabled(False), block:
        for i in range(3):
            a = Tagged(torch.tensor([0.2, 0.3, 0.5]) + i, frozenset({f"z_{i}"}))
            b = Tagged(torch.ones(3), frozenset({f"u_{i}", "w"}))
            fns.append(make(a, b))
    return fns, mixing


@pytest.mark.parametrize("name", [*PLAIN, *ONE_BY_ONE])
def test_tags_are_those_that_operations_leave(name: str) -> None:
    make = (PLAIN | ONE_BY_ONE)[name]
    (here, seen), (pyros, known) = made(make, here=True), made(make, here=False)
    for own, other in zip(here, pyros, strict=True):
        mine, theirs = tensors_of(own), tensors_of(other)
        assert type(own) is type(other) and vars(own).keys() == vars(other).keys()
        assert [tags_of(t) for t in mine] == [tags_of(t) for t in theirs]
        assert all(torch.equal(t._t, o._t) for t, o in zip(mine, theirs, strict=True) if tags_of(t))
        same = [[s is t for s in mine] for t in mine]
        assert same == [[s is t for s in theirs] for t in theirs]
    assert (seen.read, seen.joined) == (known.read, known.joined)


@pytest.mark.parametrize("name", [*PLAIN, *ONE_BY_ONE])
def test_operations_are_looked_at_once_where_all_tags_go_through(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    see = Mixing.see
    monkeypatch.setattr(Mixing, "see", lambda *a: (looks.append(0), see(*a))[1])
    made((PLAIN | ONE_BY_ONE)[name], here=True)
    both = len(looks)
    looks.clear()
    made((PLAIN | ONE_BY_ONE)[name], here=False)
    assert (3 * both == len(looks)) == (name in PLAIN)


def test_elements_of_plates_are_looked_at_each_time() -> None:
    mixing = Mixing({"z": frozenset({3})})
    with TaggedDistributions(mixing).made_here():
        for _ in range(2):
            mixing.suspects.clear()
            dist.Categorical(Tagged(torch.ones(3, 3), frozenset({"z"})))
            assert mixing.suspects == {"z"}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2]])
def test_a_dimension_that_an_index_takes_is_mixed_in_whatever_order(order: list[int]) -> None:
    """An order may be another one at the next call, though it is none today."""
    a = Tagged(torch.rand(5, 4), frozenset({"z"}))
    c = Tagged(torch.tensor([0, 3, 1, 1, 2]), frozenset({"c"}))
    mixing = Mixing({"z": frozenset({5}), "c": frozenset({5})})
    with looking_at(mixing):
        _ = a[torch.tensor(order), c[: len(order)]]
    assert "z" in mixing.suspects


def test_a_component_that_the_library_chooses_itself_mixes_no_rows() -> None:
    means = Tagged(torch.rand(5, 4), frozenset({"z"}))
    emission = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(4)), dist.Normal(means, torch.ones(4))
    )
    parts = components_of_mixture(emission)
    assert parts is not None
    mixing = Mixing({"z": frozenset({5}), "c": frozenset({5})})
    component = Tagged(torch.tensor([0, 3, 1, 1, 2]), frozenset({"c"}))
    with looking_at(mixing), pyro.validation_enabled(False):
        chosen = parts.chosen(component)
    assert not mixing.suspects and tags_of(chosen.loc) == {"z", "c"}


def test_a_diagonal_of_two_plates_is_mixed():
    mixing, both = Mixing({"z": frozenset({5})}), torch.arange(5)
    with looking_at(mixing):
        _ = Tagged(torch.rand(5, 5), frozenset({"z"}))[both, both]
    assert mixing.suspects == {"z"}


def test_an_index_of_yes_and_no_mixes_what_it_is_made_of():
    mixing = Mixing({"mu": frozenset({5}), "z": frozenset({5})})
    with looking_at(mixing):
        taken = Tagged(torch.tensor([True, False, True, True, False]), frozenset({"z"}))
        _ = Tagged(torch.rand(5), frozenset({"mu"}))[taken]
    assert mixing.suspects == {"mu", "z"}


def test_an_order_that_elements_alone_are_taken_in_is_looked_at() -> None:
    """It may be another one at the next call, which reads elements of other rows then."""
    a = Tagged(torch.rand(2, 5), frozenset({"z"}))
    mixing = Mixing({"z": frozenset({5})})
    with looking_at(mixing):
        _ = a[..., torch.arange(5)]
    assert mixing.suspects == {"z"}
