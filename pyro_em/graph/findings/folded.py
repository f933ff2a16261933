"""The sites of a run that is over, in little memory: the next run has as much of its own.

A chain of a thousand steps has a thousand distributions of a few numbers each. The autograd graph
behind these numbers takes half of a plain run's memory, and is of no use once it has been looked at
(`without_graphs`). Python objects and tensors take thirty times the memory of the numbers in them:
where a later run is only compared with a run, one site of each form stands for all, with a stack of
each of its tensors (`Folded`). A site that is asked for is made again, and lives as long as who asked
holds it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_em.graph.forms import forms_of, in_forms
from pyro_em.tracing.allocation import is_shadow
from pyro_em.tracing.sites import factors_in

_MANY = 64  # sites of one form from which on they are stacked

_KNOWN = ("pyro.distributions.", "torch.distributions.")

_SMALL = 2**12  # cells of one tensor; what is larger takes the memory of its numbers anyway


@dataclass(frozen=True, eq=False)
class _Alike:
    """Sites of one form.

    Attributes:
        template: One of them.
        stacks: Their values, then the tensors of their distributions. # (sites, *shape) each
        held: The identities of the tensors of the template's distribution, in the order of these.
    """

    template: Mapping[str, Any]
    stacks: Sequence[Tensor]
    held: Sequence[int]

    def site(self, name: str, i: int) -> dict[str, Any]:
        """The site that is number ``i`` of them."""
        value, *rows = (stack[i] for stack in self.stacks)
        fn = _with_tensors(self.template["fn"], dict(zip(self.held, rows, strict=True)))
        return {**self.template, "name": name, "value": value, "fn": fn}


class Folded(Mapping[str, Mapping[str, Any]]):
    """Traced sites by name, in their order.

    Args:
        sites: The sites of a run, possibly with tags.

    Attributes:
        forms: Of the sites, as `forms_of` finds them.
    """

    def __init__(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self.forms: dict[str, Hashable | None] = forms_of(sites)
        self._places: dict[str, tuple[_Alike, int] | Mapping[str, Any]] = dict(sites)
        for names in in_forms(self.forms):
            if len(names) < _MANY or self.forms[names[0]] is None:
                continue
            first = sites[names[0]]
            held = [_held(sites[n]) for n in names]
            if max(t.numel() for t in held[0]) > _SMALL:
                continue
            stacks = [torch.stack(list(each)).detach() for each in zip(*held, strict=True)]
            fn = _copied(first["fn"])
            alike = _Alike({**first, "fn": fn}, stacks, [id(t) for t in _tensors(fn)])
            self._places |= {n: (alike, i) for i, n in enumerate(names)}

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        place = self._places[name]
        return place[0].site(name, place[1]) if isinstance(place, tuple) else place

    def value(self, name: str) -> Tensor:
        """The value of a site, possibly with tags."""
        place = self._places[name]
        if isinstance(place, tuple):
            return place[0].stacks[0][place[1]]
        return place["value"]  # type: ignore[no-any-return]

    def some(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Some sites, in the order of their names."""
        return [self[name] for name in names]

    def values_of(self, names: Sequence[str]) -> list[Tensor]:
        """The values of some sites, possibly with tags."""
        return [self.value(name) for name in names]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def without_graphs(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same sites with detached distributions, where they are many or large, and draws.

    What a distribution of the user's own class holds is left as it is.
    """
    out = dict(sites)
    for name, site in factors_in(out).items():
        fn, value = site["fn"], site["value"]
        if len(sites) < _MANY and not (isinstance(value, Tensor) and value.numel() > _SMALL):
            continue
        if _is_known(fn):
            own = {id(t): t.detach() for t in _tensors(fn) if t.grad_fn is not None}
            out[name] = {**site, "fn": _with_tensors(fn, own)} if own else site
        if not site["is_observed"] and isinstance(value, Tensor) and value.grad_fn is not None:
            out[name] = {**out[name], "value": value.detach()}
    return out


def with_other_shadows(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sites of a run with shadows of their own: those of the run are then the model's alone."""
    out = dict(sites)
    for name, site in sites.items():
        if _has_shadows(site):
            own = {id(t): t.detach() for t in _tensors(site["fn"])}
            fn, value = _with_tensors(site["fn"], own), site["value"]
            out[name] = {**site, "fn": fn, "value": value.detach() if is_shadow(value) else value}
    return out


def _has_shadows(site: Mapping[str, Any]) -> bool:
    """Whether a site whose distribution is of a known form holds shadows."""
    fn = site["fn"]
    if site["type"] != "sample" or not isinstance(fn, Distribution) or not _is_known(fn):
        return False
    return is_shadow(site["value"]) or any(map(is_shadow, _tensors(fn)))


def _is_known(fn: Distribution) -> bool:
    """Whether a distribution and all inside it are of torch's or Pyro's classes."""
    inside = (item for item in vars(fn).values() if isinstance(item, Distribution))
    return type(fn).__module__.startswith(_KNOWN) and all(map(_is_known, inside))


def _held(site: Mapping[str, Any]) -> list[Tensor]:
    """The value of a site and the tensors of its distribution, without tags."""
    return [_untagged(t) for t in (site["value"], *_tensors(site["fn"]))]


def _untagged(t: Tensor) -> Tensor:
    return getattr(t, "_t", t)


def _tensors(fn: Distribution) -> list[Tensor]:
    """The tensors that a distribution of a known form holds, each once."""
    found: dict[int, Tensor] = {}
    for item in vars(fn).values():
        parts = _tensors(item) if isinstance(item, Distribution) else [item]
        found |= {id(t): t for t in parts if isinstance(t, Tensor)}
    return list(found.values())


def _with_tensors(fn: Distribution, own: Mapping[int, Tensor]) -> Distribution:
    """A distribution like another one, with other tensors.

    Args:
        fn: The other one.
        own: By the identity of a tensor there the one that takes its place.
    """
    new = object.__new__(type(fn))
    for name, item in vars(fn).items():
        if isinstance(item, Distribution):
            item = _with_tensors(item, own)
        new.__dict__[name] = own.get(id(item), item)
    return new


def _copied(fn: Distribution) -> Distribution:
    """A distribution with tensors of its own, which hold on to nothing of a run."""
    return _with_tensors(fn, {id(t): _untagged(t).detach().clone() for t in _tensors(fn)})
