"""The Gaussian block: Gaussian latents and all sites that they connect, solved together.

Its log evidence at parameters takes the place of the sites' factors: one group of the graph, whose
arguments are those of all sites, each bound to the parameters as ever. In the M-step the sites stand
for themselves, with posterior moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.posteriors.gaussians.coordinates import (
    apart,
    completed,
    seen_coordinates,
    with_seen_alone,
)
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.integrated import Blocks, Integrated, Solution
from pyro_em.posteriors.gaussians.linear_gaussian import solve
from pyro_em.posteriors.gaussians.own_rows import MANY, own_rows
from pyro_em.posteriors.gaussians.site_forms import SiteForm, Term
from pyro_em.posteriors.gaussians.site_rows import SiteNumbers
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.gaussian_rows import (
    coefficient_rows,
    event_shape,
    is_matrix,
    rows_of,
    tril_rows,
    weights_of,
)

Arguments = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianBlock:
    """Gaussian latents and all sites that read them.

    Attributes:
        groups: The sites in model order, one group each, over plates and the whole scope; a latent's
            value is zero.
        lines: What the mean of each reads.
        scope: Discrete latents that any of the sites depends on.
        states: How many values each of these has.
        plates: Plates whose elements no unknown connects: those of the table.
        sizes: Their sizes.
        traced: The sites as a run with all Gaussian latents at zero shows them.
    """

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    scope: tuple[str, ...] = ()
    states: tuple[int, ...] = ()
    plates: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    traced: tuple[Group, ...] = ()

    @cached_property
    def numbers_of_sites(self) -> dict[str, int]:
        """The number of each site."""
        return {g.members[0]: i for i, g in enumerate(self.groups)}

    @cached_property
    def latents(self) -> dict[str, int]:
        """The number of each latent's site."""
        return {
            name: i
            for i, g in enumerate(self.groups)
            if g.role is Role.GAUSSIAN
            for name in g.members
        }

    def first_element(self, latent: str) -> int:
        """The number of a latent's first element among those of its site's members."""
        group = self.groups[self.latents[latent]]
        rows = torch.Size(group.sizes[: group.n_plates]).numel()
        return 0 if len(group.members) == 1 else group.members.index(latent) * rows

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return "Gaussian blocks"

    @property
    def kind(self) -> str:
        """What the E-step works on, in words."""
        largest, core = self.largest, self.core
        shown = f"{largest} unknown{'s' * (largest > 1)} in the largest block"
        return f"{shown}, all but {core} eliminated side by side" if core else shown

    @property
    def core(self) -> int:
        """How many unknowns the largest matrix is about that is left once leaves are eliminated."""
        if self.of_a_row is not None:
            return 0
        return self.layout.core if isinstance(self.layout, BlockLayout) else 0

    @property
    def largest(self) -> int:
        """How many unknowns the largest of those that belong together are."""
        return (self.of_a_row or self.layout).largest

    @property
    def dense(self) -> int:
        """Unknown numbers of the largest matrix without zeros that an E-step factors."""
        if self.of_a_row is None and not isinstance(self.layout, BlockLayout):
            return 0
        return self.core or self.largest

    @property
    def unknowns(self) -> int:
        """How many numbers all latents are together."""
        own = [g for g in self.groups if g.role is Role.GAUSSIAN]
        return sum(
            len(g.members) * math.prod(g.sizes[: g.n_plates]) * event_shape(g).numel() for g in own
        )

    @property
    def representative(self) -> GaussianBlock:
        """A dense block whose moments depend on the parameters as those of this one do."""
        return self

    @property
    def layout(self) -> Blocks:
        """Which unknowns belong together."""
        return self._dense

    @cached_property
    def _dense(self) -> BlockLayout:
        return self._layout_of([torch.Size(line.sizes).numel() for line in self.lines])

    def _layout_of(self, rows: Sequence[int]) -> BlockLayout:
        """How the unknowns of the first rows of each site lie."""
        forms = []
        for group, line, own in zip(self.groups, self.lines, rows, strict=True):
            terms = tuple(
                Term(self.numbers_of_sites[r.latent], r.elements[:own]) for r in line.reads
            )
            width = event_shape(group).numel()
            forms.append(SiteForm(line.site, own, width, group.role is Role.GAUSSIAN, terms))
        return BlockLayout.of(forms, self.groups[0].value.device)

    @cached_property
    def of_a_row(self) -> BlockLayout | None:
        """How the unknowns of a row lie, where each of many has its own, all in one block."""
        first = self.groups[0]
        if type(self) is not GaussianBlock or not first.n_plates or first.sizes[0] < MANY:
            return None
        if own_rows(self.groups, self.lines) is None:
            return None
        found = self._layout_of([math.prod(line.sizes[1:]) for line in self.lines])
        return None if found.leaves or found.blocks != 1 else found

    def over(self, plates: tuple[str, ...], sizes: tuple[int, ...]) -> GaussianBlock:
        """The same block with a table over some plates; its layout is not computed again."""
        out = replace(self, plates=plates, sizes=sizes)
        for name in ("_dense", "of_a_row"):
            if name in vars(self):
                vars(out)[name] = vars(self)[name]
        return out

    def with_groups(self, groups: tuple[Group, ...]) -> GaussianBlock:
        """The same block of as many other rows; its layout is not computed again."""
        out = replace(self, groups=groups)
        for name in ("_dense", "element_of_block"):
            vars(out)[name] = getattr(self, name)
        return out

    @property
    def cost(self) -> int:
        """Numbers in the matrices of one E-step."""
        if self.of_a_row is not None:
            return math.prod(self.states) * self.groups[0].sizes[0] * self.largest**2
        if self._dense.leaves:
            return math.prod(self.states) * self._dense.matrix_size
        sizes = torch.as_tensor(self._dense.block_sizes, dtype=torch.float64)
        return math.prod(self.states) * int(sizes.square().sum())

    def of_site(self, i: int, arguments: Arguments) -> dict[str, Tensor]:
        """The arguments of one site among those of all."""
        group = self.groups[i]
        return {a: arguments[piece(group.members[0], a)] for a in group.arguments}

    def solve(self, arguments: Arguments) -> Solution:
        """The posterior of the latents, for each state of the scope.

        Raises:
            DegenerateError: If an observation has no noise.
        """
        found = self.solution(arguments)
        if found.degenerate:
            raise DegenerateError(self._without_noise(arguments))
        return found

    def solution(self, arguments: Arguments) -> Solution:
        """The posterior of the latents, which is not valid if an observation has no noise."""
        numbers = [
            _numbers(group, self.of_site(i, arguments)) for i, group in enumerate(self.groups)
        ]
        return solve(self._dense, numbers)

    def _without_noise(self, arguments: Arguments) -> str:
        sites = []
        for i, group in enumerate(self.groups):
            own = self.of_site(i, arguments)
            if group.role is Role.GAUSSIAN:
                continue
            matrix = is_matrix(group)
            spread = tril_rows(group, own).diagonal(dim1=-2, dim2=-1) if matrix else own["scale"]
            if bool((spread == 0).any()):
                sites.append(group.members[0])
        where = f"site '{sites[0]}'" if sites else "model"
        return message(
            where,
            "its observation noise is exactly zero.",
            "the evidence is infinite, or zero, where data below a Gaussian latent have no noise",
            ["let the scale be positive", "give it a floor: ClosedForm(floor=1e-6)"],
        )

    def table(self, solution: Solution) -> Tensor:
        """The log evidence in nats, per element of the plates and state of the scope.

        Returns:
            # (1, *sizes, *states)
        """
        evidence = solution.log_evidence
        out = evidence.new_zeros(len(evidence), math.prod(self.sizes))
        out = out.index_add(1, self.element_of_block.to(out.device), evidence)
        for i, group in enumerate(self.groups):
            if group.role is not Role.GAUSSIAN:
                rows = solution.constant_rows(i)
                out = out.index_add(1, self.element_of_row(i).to(out.device), rows)
        return out.transpose(0, 1).reshape(1, *self.sizes, *self.states)

    @cached_property
    def element_of_block(self) -> Tensor:
        """For each block of unknowns the element of the table's plates to which it belongs."""
        return elements_of_blocks(self, self.plates)[0]

    def element_of_row(self, i: int) -> Tensor:
        """For each row of a site the element of the table's plates to which it belongs. # (rows,)"""
        group = self.groups[i]
        if is_within(group, self.plates):
            return elements_in(group, self.plates)
        return self.element_of_block[self.layout.block_of_row[i]]

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    def believed(
        self, solution: Integrated, arguments: Arguments, counts: Tensor, complete: bool = True
    ) -> list[tuple[Group, Tensor]]:
        """The sites with the posterior moments of what they read, and how often each cell counts.

        Args:
            solution: The posterior of the latents.
            arguments: At which it was computed.
            counts: The posterior of the scope. # (1, *sizes, *states)
            complete: Whether vectors that were seen in part are completed, as an M-step wants them;
                otherwise what was seen counts alone.
        """
        out = []
        for i, group in enumerate(self.groups):
            own = self.of_site(i, arguments)
            of_rows = counts.reshape(-1, *self.states)[self.element_of_row(i).to(counts.device)]
            full = len(group.members), *group.sizes
            cells = of_rows.reshape(full).to(torch.float64)
            moments = solution.linear_moments(i, diagonal=not is_matrix(group))
            coefficients, constant = solution.coefficients(i), None
            seen = seen_coordinates(group)
            if seen is not None and complete:
                moments = completed(moments, tril_rows(group, own), seen)
                coefficients = coefficient_rows(group, own)
            elif seen is not None:
                own = with_seen_alone(group, own, seen)
                coefficients = coefficient_rows(group, own)
                constant = 0.5 * math.log(2 * math.pi) * (~seen).sum(-1)
            belief = Moments(moments, coefficients, weights_of(group, cells), constant)
            weights = cells * replace(group, elements=None).weights().detach()
            out.append((replace(group, arguments=own, belief=belief), weights.expand(full)))
        return out


def piece(site: str, argument: str) -> str:
    """What an argument of a site is called among those of all sites."""
    return f"{argument} of '{site}'"


def _numbers(group: Group, arguments: Arguments) -> SiteNumbers:
    matrix = is_matrix(group)
    spread = tril_rows(group, arguments) if matrix else rows_of(group, arguments["scale"])
    coefficients = tuple(rows_of(group, arguments[a], 1) for a in group.lines if a != "loc")
    latent = group.role is Role.GAUSSIAN
    weight = None
    if not latent and not counts_once(group):
        own = weights_of(group)[0]
        weight = own.unsqueeze(-1) if own.dim() == 1 else own
    value = None if latent else rows_of(group, group.value)[0]
    seen = seen_coordinates(group)
    if seen is not None:
        spread = apart(spread, seen)
        weight = seen.to(spread) if weight is None else weight * seen
    offset = rows_of(group, arguments["loc"])
    return SiteNumbers(value, offset, spread, coefficients, matrix, weight, seen is not None)


def counts_once(group: Group) -> bool:
    """Whether every entry of a site's value counts once."""
    return group.mask is None and group.elements is None and group.is_unscaled


def elements_in(group: Group, plates: Sequence[str]) -> Tensor:
    """For each row of a site its element of some plates, as a flat number. # (rows,)"""
    names, sizes = group.dims[0][: group.n_plates], group.sizes[: group.n_plates]
    found: Tensor | None = None
    for plate in plates:
        at = names.index(plate)
        index = torch.arange(sizes[at]).reshape(-1, *(1,) * (len(sizes) - at - 1))
        found = index if found is None else found * sizes[at] + index
    out = torch.zeros((), dtype=torch.long) if found is None else found
    return out.expand((len(group.members), *sizes)).reshape(-1)


def is_within(group: Group, plates: Sequence[str]) -> bool:
    """Whether a site is in all of some plates."""
    return set(plates) <= set(group.dims[0][: group.n_plates])


def elements_of_blocks(block: GaussianBlock, plates: Sequence[str]) -> tuple[Tensor, str]:
    """For each block of unknowns its element of some plates, and a latent that crosses them.

    A row outside the plates, which reads latents by index, belongs where these do.
    """
    device = block.groups[0].value.device
    if block.of_a_row is not None and list(plates) == [block.groups[0].dims[0][0]]:
        return torch.arange(block.groups[0].sizes[0], device=device), ""
    layout = block.layout
    if not plates:  # their only element
        return torch.zeros(layout.blocks, dtype=torch.long, device=device), ""
    low = torch.full((layout.blocks,), torch.iinfo(torch.long).max, device=device)
    high = torch.full((layout.blocks,), -1, device=device)
    for i, group in enumerate(block.groups):
        at = layout.block_of_row[i].to(device)
        if is_within(group, plates):
            index, reading = elements_in(group, plates).to(device), at >= 0
            low = low.scatter_reduce(0, at[reading], index[reading], "amin")
            high = high.scatter_reduce(0, at[reading], index[reading], "amax")
        elif bool((at < 0).any()):
            return low, next(iter(block.latents))
    crossing = low != high
    if bool(crossing.any()):
        for i, group in enumerate(block.groups):
            if group.role is Role.GAUSSIAN:
                found = crossing[layout.block_of_element(i).to(device)].nonzero()
                if len(found):
                    rows = torch.Size(group.sizes[: group.n_plates]).numel()
                    return low, group.members[int(found[0]) // rows]
    return low, ""
