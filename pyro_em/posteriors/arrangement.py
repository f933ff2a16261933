"""Which block serves which component of latents, and why quicker ones do not.

Every component is asked on its own: the groups that read it, without those of others. How densities
are evaluated is decided for all together, since components may share parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pyro_em.densities.density import NormalRows
from pyro_em.densities.layout import Layout, layout_of
from pyro_em.densities.theta import At
from pyro_em.densities.tying import collapsed, collapsed_updates, placed, places_of
from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.parting import GraphPart, Parting
from pyro_em.posteriors.block import Component, components_of
from pyro_em.posteriors.contracted import Contraction
from pyro_em.posteriors.quick import Outline, QuickBlock
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation, Key, Statistics
from pyro_em.updates.update import ParameterUpdate

Kinds = Sequence[type[QuickBlock]]
Updates = Mapping[str, ParameterUpdate]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PlacedBlock:
    """A block beside others. It numbers the groups of its own graph; the whole has other numbers.

    Attributes:
        block: The block.
        first: The number of its first group in the whole.
        size: How many groups it has.
    """

    block: QuickBlock | Contraction
    first: int
    size: int

    def inside(self, at: At) -> At:
        """Parameters by the part's numbers of groups."""
        arguments, prepared = self.own(at.arguments), self.own(at.prepared)
        return replace(at, arguments=arguments, prepared=prepared)

    def own(self, by_group: Mapping[int, T]) -> dict[int, T]:
        """What is of its groups, by its numbers."""
        return _own(by_group, self.first, self.size)

    def outside(self, found: Expectation) -> Expectation:
        """Sums by the numbers that the groups have in the whole."""
        sums: dict[Key, Statistics] = {
            key if isinstance(key, str) else key + self.first: named
            for key, named in found.sums.items()
        }
        return Expectation(found.log_evidence, sums, noise=found.noise)


def _own(by_group: Mapping[int, T], first: int, size: int) -> dict[int, T]:
    return {g - first: v for g, v in by_group.items() if first <= g < first + size}


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Blocks side by side, still without their parameters.

    Attributes:
        component: All components.
        graph: The groups of all parts, one part after the other, then the priors.
        updates: Updates of all parameters, with the numbers of these groups.
        layout: How its groups are evaluated.
        kernels: The kernels.
        rest: What is contracted: components that no kernel serves, and factors that read no latent
            where no kernel takes them; None where nothing is.
        serves: For each component its kernel; None where it is contracted.
        said: For each component what the kernels said that do not serve it.
    """

    component: Component
    graph: FactorGraph
    updates: Updates
    layout: Layout
    kernels: tuple[PlacedBlock, ...]
    rest: PlacedBlock | None
    serves: Mapping[tuple[str, ...], QuickBlock | None]
    said: Mapping[tuple[str, ...], Sequence[Finding]]

    @property
    def normals(self) -> dict[int, NormalRows]:
        """Normal groups that kernels evaluate by matrix products."""
        out: dict[int, NormalRows] = {}
        for part in self.kernels:
            assert isinstance(part.block, QuickBlock)
            out |= {g + part.first: rows for g, rows in part.block.normals.items()}
        return out


@dataclass(eq=False)
class _Candidate:
    """A component of latents, and the kernels that have not been asked yet."""

    latents: tuple[str, ...]
    left: list[type[QuickBlock]]
    said: list[Finding] = field(default_factory=list)

    def refuse(self, finding: Finding) -> None:
        """Go on to the next kernel."""
        self.said.append(finding)
        del self.left[0]


@dataclass(frozen=True, eq=False)
class _Claim:
    """A part of the graph that a kernel can solve as far as its outline tells."""

    by: _Candidate
    component: Component
    outline: Outline[QuickBlock]
    origin: tuple[int, ...]
    takes_known: bool


def arranged(component: Component, kinds: Kinds) -> Arrangement:
    """Ask the kernels, one after the other, for every component of latents.

    Args:
        component: The whole of a collapsed graph.
        kinds: The kernels, the quicker ones first.
    """
    candidates = [_Candidate(names, list(kinds)) for names in components_of(component.graph)]
    for group in component.graph.groups:
        read = {d for dims in group.dims for d in dims} & set(component.graph.latents)
        if group.role is Role.POINT and read:
            site = f"site '{group.members[0]}'"
            for c in candidates:
                if read.intersection(c.latents):
                    c.left.clear()
                    c.said.append(Finding(site, f"the prior of {site} reads a latent: no kernel"))
    parting = Parting(component.graph)
    while True:
        found = _tried(component, parting, candidates)
        if found is not None:
            return found


def _tried(
    component: Component, parting: Parting, candidates: Sequence[_Candidate]
) -> Arrangement | None:
    """The arrangement of what the candidates ask first; None where one of them has to go on."""
    graph, values = component.graph, component.values
    claims = list(_claims(component, parting, candidates))
    is_taken = any(claim.takes_known for claim in claims)
    served = {id(claim.by) for claim in claims}
    others = [name for c in candidates if id(c) not in served for name in c.latents]
    left = parting.part_of(others, None if is_taken else parting.known)
    rest, priors = _component(component, left), parting.part_of((), parting.priors)
    graphs = [claim.outline.graph for claim in claims] + [rest.graph, priors.graph]
    origins = [*(claim.origin for claim in claims), left.origin, priors.origin]
    firsts = [sum(len(g.groups) for g in graphs[:i]) for i in range(len(graphs))]
    whole = replace(graph, groups=tuple(group for g in graphs for group in g.groups))
    places = places_of([g for origin in origins for g in origin])
    updates = collapsed_updates(placed(component.updates, places), whole)
    eligible: list[int] = []
    sizes: dict[int, int] = {}
    for claim, first in zip(claims, firsts, strict=False):
        eligible += [first + g for g in claim.outline.eligible]
        own = claim.outline.sizes
        if own is None:
            size = next(iter(claim.outline.graph.latents.values())).size
            own = dict.fromkeys(range(len(claim.outline.graph.groups)), size)
        sizes |= {first + g: size for g, size in own.items()}
    layout = layout_of(whole, updates, values, eligible, sizes)
    parts: list[PlacedBlock] = []
    for claim, first in zip(claims, firsts, strict=False):
        size = len(claim.outline.graph.groups)
        linears = _own(layout.linears, first, size)
        own_layout = Layout(layout.naturals, linears, _own(layout.lines, first, size))
        block = claim.outline.finish(own_layout)
        if isinstance(block, Finding):
            claim.by.refuse(block)
            continue
        block.component = claim.component
        parts.append(PlacedBlock(block, first, size))
    if len(parts) < len(claims):
        return None
    serves: dict[tuple[str, ...], QuickBlock | None] = {c.latents: None for c in candidates}
    for claim, part in zip(claims, parts, strict=True):
        assert isinstance(part.block, QuickBlock)
        serves[claim.by.latents] = part.block
    return Arrangement(
        component,
        whole,
        updates,
        layout,
        tuple(parts),
        _contracted(rest, firsts[len(claims)]),
        serves,
        {c.latents: c.said for c in candidates},
    )


def _claims(
    component: Component, parting: Parting, candidates: Sequence[_Candidate]
) -> Iterator[_Claim]:
    """What the first kernel that serves makes of each component; the first one takes what is known."""
    is_taken = not parting.known
    for candidate in candidates:
        latents = {name: component.graph.latents[name] for name in candidate.latents}
        while candidate.left:
            kind = candidate.left[0]
            finding = kind.glance(latents)
            if finding is None:
                claim = None if is_taken else _claim(component, parting, candidate, True)
                if claim is None or isinstance(claim, Finding):
                    claim = _claim(component, parting, candidate, False)
                if isinstance(claim, _Claim):
                    is_taken = is_taken or claim.takes_known
                    yield claim
                    break
                finding = claim
            candidate.refuse(finding)


def _claim(
    component: Component, parting: Parting, candidate: _Candidate, with_known: bool
) -> _Claim | Finding:
    part = parting.part_of(candidate.latents, parting.known if with_known else None)
    own = _component(component, part)
    outline = candidate.left[0].outline(own)
    if isinstance(outline, Finding):
        return outline
    origin = part.origin
    if outline.origin is not None:
        origin = tuple(origin[g] for g in outline.origin)
    return _Claim(candidate, own, outline, origin, with_known)


def _component(component: Component, part: GraphPart) -> Component:
    """A part of the graph as a component; what was stacked with others may collapse now."""
    updates = placed(component.updates, places_of(part.origin))
    graph = collapsed(part.graph)
    return Component(graph, updates, component.values, tuple(graph.latents))


def _contracted(rest: Component, first: int) -> PlacedBlock | None:
    if not rest.graph.groups:
        return None
    block = Contraction.match(rest)
    assert isinstance(block, Contraction)
    return PlacedBlock(block, first, len(rest.graph.groups))
