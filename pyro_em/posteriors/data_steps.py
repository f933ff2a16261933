"""At which step of a series its data come: what a filter has seen by then.

A loop numbers what it samples: ``y_7`` comes at step 7 of ``h_*``. Where data are numbered otherwise
(``x_1`` on ``z_0``), model order decides: a site comes at the step whose latent was sampled last
before it. Data that are observed when all latents are there, as rows of one plate, come at the latest
step that they read. Data of no step (of a regression beside the series) are there from the start.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.gaussian_faces import GaussianFaces
from pyro_em.posteriors.names import own_name
from pyro_em.tracing.sites import Role

_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)", re.DOTALL)

_ALWAYS = -1  # before the first step


def stem_of(name: str) -> str:
    """A name without its last number: what all steps of a series share.

    Example:
        >>> stem_of("h_12"), stem_of("h")
        ('h_#', 'h')
    """
    match = _NUMBERED.fullmatch(name)
    return name if match is None else f"{match[1]}#{match[3]}"


def number_of(name: str) -> int | None:
    """The last number in a name, or None."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else int(match[2])


def users_name(site: str) -> str:
    """The name in the model of the observed part of a site with ``obs_mask``."""
    return site.removesuffix("_observed")


def observed_sites(graph: FactorGraph) -> Iterator[tuple[int, int, Group]]:
    """All observed sites: the number of the graph's group, the site's own number in it, its group.

    The number is the place among the members of a group, or in the block that the group stands for.
    """
    for g, outer in enumerate(graph.groups):
        if outer.nested is not None:
            for i, group in enumerate(outer.nested.groups):
                if group.role is Role.DATA:
                    yield g, i, group
        elif outer.role is Role.DATA:
            for i in range(len(outer.members)):
                yield g, i, outer


@dataclass(frozen=True, eq=False)
class DataSteps:
    """When data come, along one series.

    Attributes:
        chain: Names of the series' latents (or of its data) in order of time.
        of_site: The step of each site of `observed_sites`, one for each of its rows: by the number of
            its group, and its own. # (rows,) each
    """

    chain: tuple[str, ...]
    of_site: Mapping[tuple[int, int], Tensor]


def steps_of_data(graph: FactorGraph, faces: GaussianFaces, chain: Sequence[str]) -> DataSteps:
    """At which step of a series each datum comes.

    Args:
        graph: The factor graph.
        faces: Its Gaussian latents.
        chain: The series: names as users know them, in order of time.
    """
    clock = _Clock.of(graph, chain)
    families = _families(graph)
    gaussians = _GaussianSteps(graph, faces, clock)
    found = {}
    for g, i, group in observed_sites(graph):
        site = group.members[0] if graph.groups[g].nested is not None else group.members[i]
        name = users_name(site)
        step = clock.of_name(name, families[stem_of(name)])
        if step is not None:
            found[g, i] = torch.tensor([step])
        elif graph.groups[g].nested is None:
            found[g, i] = torch.tensor([clock.latest(group.dims[i])])
        else:
            found[g, i] = gaussians.of_rows(g, i)
    return DataSteps(tuple(chain), found)


def _families(graph: FactorGraph) -> dict[str, list[str]]:
    """Observed sites, as users know them, by what their names share."""
    out: dict[str, list[str]] = {}
    for g, i, group in observed_sites(graph):
        site = group.members[0] if graph.groups[g].nested is not None else group.members[i]
        out.setdefault(stem_of(users_name(site)), []).append(users_name(site))
    return out


@dataclass(frozen=True, eq=False)
class _Clock:
    """The steps of a series, by number and by model order.

    Attributes:
        at: The step of each latent of the series.
        numbers: Their numbers, if they have any and these rise.
        order: The place of every site in the model.
        places: The places of the series' latents, if they rise.
    """

    at: Mapping[str, int]
    numbers: tuple[int, ...] | None
    order: Mapping[str, int]
    places: tuple[int, ...] | None

    @classmethod
    def of(cls, graph: FactorGraph, chain: Sequence[str]) -> _Clock:
        order = {name: k for k, name in enumerate(graph.structure.sites)}
        numbers = [n for n in map(number_of, chain) if n is not None]
        own = [own_name(graph, name) for name in chain]
        places = [order[n] for n in own if n in order]
        return cls(
            {name: t for t, name in enumerate(chain)},
            tuple(numbers) if len(numbers) == len(chain) and _rises(numbers) else None,
            order,
            tuple(places) if len(places) == len(chain) and _rises(places) else None,
        )

    def of_name(self, name: str, family: Sequence[str]) -> int | None:
        """The step of a site by its name or place; None where what it reads decides."""
        if name in self.at:
            return self.at[name]
        number = number_of(name)
        if number is not None and self.numbers is not None and len(self.numbers) > 1:
            own = {number_of(n) for n in family}
            if own <= set(self.numbers):
                return bisect_right(self.numbers, number) - 1
        if self.places is None:
            return None
        reached = [self._reached(n) for n in family]
        if min(reached) < len(self.places) - 1:
            return self._reached(name)
        return None

    def _reached(self, name: str) -> int:
        assert self.places is not None
        place = self.order.get(name, self.order.get(f"{name}_observed", -1))
        return bisect_right(self.places, place) - 1

    def of_latent(self, name: str) -> int:
        """The step of a latent, of the series or beside it; −1 where it belongs to none."""
        name = name.removesuffix("_unobserved")
        if name in self.at:
            return self.at[name]
        number = number_of(name)
        if number is None or self.numbers is None:
            return _ALWAYS
        return bisect_right(self.numbers, number) - 1

    def latest(self, names: Iterable[str]) -> int:
        """The latest step of some latents."""
        return max((self.of_latent(n) for n in names), default=_ALWAYS)


class _GaussianSteps:
    """The steps of rows that read Gaussian latents."""

    def __init__(self, graph: FactorGraph, faces: GaussianFaces, clock: _Clock) -> None:
        self.graph, self.faces, self.clock = graph, faces, clock
        self._elements: dict[tuple[int, int], Tensor] | None = None

    @property
    def elements(self) -> dict[tuple[int, int], Tensor]:
        """The step of every element of each latent, by group and number there. # (elements,) each"""
        if self._elements is None:
            found: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
            for name in self.faces.places:
                site = self.faces.site("steps", name)
                own = site.elements.reshape(-1).cpu(), self.clock.of_latent(name)
                found.setdefault((site.place, site.number), []).append(own)
            self._elements = {}
            for key, parts in found.items():
                steps = torch.full((1 + max(int(e.max()) for e, _ in parts),), _ALWAYS)
                for elements, step in parts:
                    steps[elements] = step
                self._elements[key] = steps
        return self._elements

    def of_rows(self, g: int, i: int) -> Tensor:
        """The latest step that each row of a site reads. # (rows,)"""
        form = self.faces.solved[g].layout.sites[i]
        out = torch.full((form.rows,), _ALWAYS)
        for term in form.terms:
            elements = term.elements.cpu()
            steps = self.elements[g, term.latent][elements.clamp(min=0)]
            out = torch.maximum(out, torch.where(elements >= 0, steps, _ALWAYS))
        return out


def _rises(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))
