"""Conjugate latents that are alike, as the steps of a loop, solved together.

Their sites are members of the same groups of the graph. To the block that solves them the members are
elements of one more plate; to the graph its table has a member for each latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock, Shared
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.gaussians.gaussian import piece
from pyro_em.updates.expectations.conjugate_beliefs import ChildBelief, PriorBelief, PriorInRows

Arguments = Mapping[str, Tensor]

_MEMBERS = "members of a group"  # the plate that stands for them; no site of a user has this name


@dataclass(frozen=True, eq=False)
class StackedConjugates:
    """Conjugate latents of equal form, each with the sites that read it.

    Attributes:
        first: The block of the first of them.
        groups: The latents' sites, then those that read them, a member each.
        scopes: Discrete latents that the sites of each depend on.
        traced: The sites as a run with the latents at their units shows them.
    """

    first: ConjugateBlock
    groups: tuple[Group, ...]
    scopes: tuple[tuple[str, ...], ...]
    traced: tuple[Group, ...]

    @property
    def latents(self) -> Sequence[str]:
        """Their names."""
        return self.groups[0].members

    @cached_property
    def place(self) -> dict[str, int]:
        """The number of each."""
        return {name: t for t, name in enumerate(self.latents)}

    @property
    def plates(self) -> tuple[str, ...]:
        """Plates of the table."""
        return self.first.plates

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their sizes."""
        return self.first.sizes

    @property
    def states(self) -> tuple[int, ...]:
        """How many values each discrete latent of a table has."""
        return self.first.states

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return self.first.words

    @cached_property
    def whole(self) -> ConjugateBlock:
        """The block of all of them, members as a plate."""
        count, own = len(self.latents), self.first.count
        offset = torch.arange(count, device=self.groups[0].value.device) * own
        reads = []
        for read in self.first.reads:
            at = offset.reshape(1, count, *(1,) * (read.elements.dim() - 1))
            elements = read.elements.unsqueeze(1)
            elements = torch.where(elements >= 0, elements + at, -1)
            order = None if read.order is None else read.order.unsqueeze(1)
            reads.append(replace(read, elements=elements, order=order))
        return replace(
            self.first,
            groups=tuple(
                _as_plate(g, b) for g, b in zip(self.groups, self.first.groups, strict=True)
            ),
            reads=tuple(reads),
            plates=(_MEMBERS, *self.plates),
            sizes=(count, *self.sizes),
            traced=(),
            _sums={},
            _equal=[],
        )

    def _laid(self, arguments: Arguments) -> dict[str, Tensor]:
        """Arguments of the sites, members as a plate."""
        names = {piece(g.members[0], a) for g in self.groups for a in g.arguments}
        return {n: arguments[n].unsqueeze(0) for n in names}

    def naturals(self, arguments: Arguments, counts: Sequence[bool]) -> Tensor:
        """As `ConjugateBlock.naturals`, of all latents. # (members * elements, 1, P)"""
        return self.whole.naturals(self._laid(arguments), counts)

    def sharing(self, shared: Shared) -> StackedConjugates:
        """As `ConjugateBlock.sharing`, of all latents."""
        return replace(self, first=replace(self.first, shared=shared))

    def solve(self, arguments: Arguments) -> ConjugateSolution:
        """The posterior of all latents, for each state of their scopes."""
        return self.whole.solve(self._laid(arguments))

    def table(self, solution: ConjugateSolution) -> Tensor:
        """The log evidence in nats. # (members, *sizes, *states)"""
        return self.whole.table(solution).squeeze(0)

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    def believed(
        self,
        solution: ConjugateSolution,
        arguments: Arguments,
        counts: Tensor,
        complete: bool = True,
    ) -> list[tuple[Group, Tensor]]:
        """As `ConjugateBlock.believed`, of counts with a member for each latent."""
        sites = self.whole.believed(solution, self._laid(arguments), counts.unsqueeze(0), complete)
        pairs = zip(sites, self.groups, strict=True)
        return [(_as_members(site, like), weight.squeeze(0)) for (site, weight), like in pairs]

    # ------------------------------------------------------------------ one of them

    def one(self, latent: str) -> ConjugateBlock:
        """The block of one latent, without the sites that read it but for their places."""
        t = self.place[latent]
        first = self.first
        own = replace(first.groups[0], members=(latent,))
        return replace(
            first, groups=(own, *first.groups[1:]), scope=self.scopes[t], _sums={}, _equal=[]
        )

    def solution_of(self, solution: ConjugateSolution, latent: str) -> ConjugateSolution:
        """The posterior of one latent."""
        t, n = self.place[latent], self.first.count
        own = slice(t * n, (t + 1) * n)
        prior = solution.prior if solution.prior.shape[0] == 1 else solution.prior[own]
        values = None if solution.values is None else solution.values[own]
        alone = {"given": solution.chi[own], "place": None, "few": None}
        return replace(solution, prior=prior, constants=(), values=values, **alone)

    def with_one(
        self, solution: ConjugateSolution, latent: str, given: ConjugateSolution
    ) -> ConjugateSolution:
        """All posteriors, with something else in the place of one."""
        t, n = self.place[latent], self.first.count
        own = slice(t * n, (t + 1) * n)
        chi, values = solution.chi.clone(), solution.values
        chi[own] = given.chi
        if given.values is not None:
            values = (solution.t if values is None else values).clone()
            values[own] = given.values
        return replace(solution, given=chi, place=None, few=None, values=values)


def stacked(
    first: ConjugateBlock, groups: Sequence[Group], traced: Sequence[Group]
) -> StackedConjugates | None:
    """Latents that are alike as one block; None where their discrete latents stand otherwise.

    Args:
        first: The block of the first.
        groups: All sites over their scopes, first the latents, with what updates have to know.
        traced: The same as traced.
    """
    n = len(groups[0].members)
    scopes = []
    for t in range(n):
        # The names of a member in the places of those of the first one.
        named: dict[str, str] = {}
        for group in traced:
            own = zip(
                group.dims[0][group.n_plates :], group.dims[t][group.n_plates :], strict=False
            )
            for a, b in own:
                if named.setdefault(a, b) != b:
                    return None
        if len(set(named.values())) < len(named):
            return None
        scopes.append(tuple(named[z] for z in first.scope))
    named_groups = []
    for group in groups:
        plates = group.dims[0][: group.n_plates]
        named_groups.append(replace(group, dims=tuple((*plates, *scope) for scope in scopes)))
    return StackedConjugates(first, tuple(named_groups), tuple(scopes), tuple(traced))


def group_of_stack(block: StackedConjugates) -> Group:
    """The group that stands for a block, a member for each latent."""
    shown = next((g for g in block.groups[1:]), block.groups[0])
    arguments, bindings = {}, {}
    for group in block.groups:
        for a, t in group.arguments.items():
            arguments[piece(group.members[0], a)] = t
            bindings[piece(group.members[0], a)] = group.bindings[a]
    sizes, count = (*block.sizes, *block.states), len(block.latents)
    raw = shown.value.new_zeros((count, *(1,) * len(sizes)), dtype=torch.float64)
    return Group(
        tuple(shown.members),
        tuple((*block.plates, *scope) for scope in block.scopes),
        len(block.plates),
        sizes,
        None,
        0,
        arguments,
        bindings,
        shown.value,
        None,
        (1.0,) * count,
        raw,
        tuple(dict.fromkeys(p for g in block.groups for p in g.params)),
        True,
        shown.distribution,
        nested=block,
    )


def _as_plate(group: Group, first: Group) -> Group:
    """A group whose members are elements of one more plate."""
    count, n = len(group.members), group.n_plates

    def wide(t: Tensor) -> Tensor:
        return t.unsqueeze(0)

    return replace(
        group,
        members=first.members,
        dims=((_MEMBERS, *first.dims[0]),),
        n_plates=n + 1,
        sizes=(count, *group.sizes),
        arguments={a: wide(t) for a, t in group.arguments.items()},
        bindings={a: b.mapped(wide) for a, b in group.bindings.items()},
        value=wide(group.value),
        mask=None if group.mask is None else wide(group.mask),
        scale=(1.0,),
        elements=None if group.elements is None else wide(group.elements),
    )


def _as_members(site: Group, like: Group) -> Group:
    """The reverse, of a site with what is believed of it."""

    def narrow(t: Tensor) -> Tensor:
        return t.squeeze(0)

    belief: Any = site.belief
    if isinstance(belief, PriorBelief):
        belief = replace(belief, t=narrow(belief.t))
    elif isinstance(belief, PriorInRows):
        all_of = belief.whole
        belief = replace(belief, whole=lambda: narrow(all_of()))
    elif isinstance(belief, ChildBelief):
        reads = None if belief.reads is None else narrow(belief.reads)
        belief = replace(belief, t=narrow(belief.t), reads=reads)
    return replace(
        site,
        members=like.members,
        dims=like.dims,
        n_plates=like.n_plates,
        sizes=like.sizes,
        arguments={a: narrow(t) for a, t in site.arguments.items()},
        bindings={a: b.mapped(narrow) for a, b in site.bindings.items()},
        value=narrow(site.value),
        mask=None if site.mask is None else narrow(site.mask),
        scale=like.scale,
        elements=None if site.elements is None else narrow(site.elements),
        belief=belief,
    )
