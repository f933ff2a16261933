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
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.names import own_name
from pyro_em.posteriors.states.state_layout import StateLayout
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


@dataclass(frozen=True, eq=False)
class ObservedSite:
    """An observed site in its graph.

    Attributes:
        name: As users know it.
        group: The number of the graph's group.
        number: The number of the site's group in the block that the graph's group stands for; None
            where no Gaussian latent enters it.
        member: The site's place among the members of its group.
        of: Its group, which may hold other sites too.
    """

    name: str
    group: int
    number: int | None
    member: int
    of: Group

    @property
    def own(self) -> str:
        """Its name in the graph: with ``obs_mask`` that of the observed part."""
        return self.of.members[self.member]

    @property
    def rows(self) -> slice:
        """Its rows among those of its group."""
        rows = torch.Size(self.of.sizes[: self.of.n_plates]).numel()
        return slice(self.member * rows, (self.member + 1) * rows)

    @property
    def alone(self) -> Group:
        """Its group without others."""

        def own(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[self.member : self.member + 1]

        value = own(self.of.value)
        assert value is not None
        return replace(
            self.of,
            members=(self.own,),
            dims=(self.of.dims[self.member],),
            arguments={a: self.of_member(t) for a, t in self.of.arguments.items()},
            value=value,
            mask=own(self.of.mask),
            elements=own(self.of.elements),
            scale=(self.of.scale[self.member],),
        )

    def of_member(self, t: Tensor) -> Tensor:
        """What of an argument of the group is its own. # (members or 1, …) to (1, …)"""
        return t if len(t) == 1 else t[self.member : self.member + 1]


def observed_sites(graph: FactorGraph) -> Iterator[ObservedSite]:
    """All observed sites, group by group."""
    for g, outer in enumerate(graph.groups):
        inside = outer.nested.groups if outer.nested is not None else (outer,)
        for i, group in enumerate(inside):
            if group.role is not Role.DATA:
                continue
            number = None if outer.nested is None else i
            for m, own in enumerate(group.members):
                yield ObservedSite(own.removesuffix("_observed"), g, number, m, group)


@dataclass(frozen=True, eq=False)
class DataSteps:
    """When data come, along one series.

    Attributes:
        chain: Names of the series' latents (or of its data) in order of time.
        of_rows: By the number of a graph's group and that of the site's group in its block (None
            without one) the step of every row, or of every member of a group without a block.
    """

    chain: tuple[str, ...]
    of_rows: Mapping[tuple[int, int | None], Tensor]

    def of_site(self, site: ObservedSite) -> Tensor:
        """The step of each row of a site. # (rows,)"""
        steps = self.of_rows[site.group, site.number]
        return steps[site.member : site.member + 1] if site.number is None else steps[site.rows]

    @property
    def last(self) -> int:
        """The step after which no data come."""
        return max((int(t.max()) for t in self.of_rows.values() if len(t)), default=_ALWAYS)


def steps_of_data(graph: FactorGraph, faces: GaussianFaces, chain: Sequence[str]) -> DataSteps:
    """At which step of a series each datum comes.

    Args:
        graph: The factor graph.
        faces: Its Gaussian latents.
        chain: The series: names as users know them, in order of time.
    """
    clock = _Clock.of(graph, chain)
    families: dict[str, list[str]] = {}
    for site in observed_sites(graph):
        families.setdefault(stem_of(site.name), []).append(site.name)
    known = {stem: clock.of_family(names) for stem, names in families.items()}
    gaussians = _GaussianSteps(graph, faces, clock)
    found: dict[tuple[int, int | None], list[Tensor]] = {}
    for site in observed_sites(graph):
        step = known[stem_of(site.name)].get(site.name)
        if site.number is None:
            at = clock.latest(site.of.dims[site.member]) if step is None else step
            steps = torch.tensor([at])
        elif step is None:
            steps = gaussians.of_rows(site)
        else:
            steps = torch.full((site.rows.stop - site.rows.start,), step)
        found.setdefault((site.group, site.number), []).append(steps)
    return DataSteps(tuple(chain), {key: torch.cat(parts) for key, parts in found.items()})


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

    def of_family(self, family: Sequence[str]) -> dict[str, int]:
        """The steps of numbered sites of one name, by number or place.

        Nothing of those about whom what they read has to decide.
        """
        numbers = {n: number_of(n) for n in family}
        if self.numbers is not None and len(self.numbers) > 1:
            own = {k for k in numbers.values() if k is not None}
            if len(own) == len(family) and own <= set(self.numbers):
                return {
                    n: bisect_right(self.numbers, k) - 1
                    for n, k in numbers.items()
                    if k is not None
                }
        if self.places is None:
            return {n: self.at[n] for n in family if n in self.at}
        reached = {n: self._reached(n) for n in family}
        if min(reached.values()) < len(self.places) - 1:
            return reached
        return {}

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

    def of_rows(self, site: ObservedSite) -> Tensor:
        """The latest step that each row of a site reads. # (rows,)"""
        assert site.number is not None
        layout = self.faces.solved[site.group].layout
        if isinstance(layout, StateLayout):
            return self._of_levels(site.group, layout)[layout.level_of_row[site.number]][site.rows]
        form = layout.sites[site.number]
        out = torch.full((form.rows,), _ALWAYS)
        for term in form.terms:
            elements = term.elements.cpu()
            steps = self.elements[site.group, term.latent][elements.clamp(min=0)]
            out = torch.maximum(out, torch.where(elements >= 0, steps, _ALWAYS))
        return out[site.rows]

    def _of_levels(self, g: int, layout: StateLayout) -> Tensor:
        """The latest step of the latents up to each level of a chain. # (levels,)"""
        out = torch.full((layout.form.steps,), _ALWAYS)
        for (group, i), steps in self.elements.items():
            if group == g:
                out = out.scatter_reduce(0, layout.level_of_row[i], steps, "amax")
        return out.cummax(0).values


def _rises(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))
