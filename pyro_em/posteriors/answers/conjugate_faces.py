"""The conjugate latents of a posterior as users ask for them, by name: moments, marginals, draws.

Given the discrete latents each element is by itself of the form of its prior: a Gamma, a Beta.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.families.conjugate_draws import drawn
from pyro_em.globs import is_glob
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.conjugates.stacked_conjugates import StackedConjugates
from pyro_em.posteriors.scales.scaled import ScaledBlock

Codes = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ConjugateSite:
    """One conjugate latent.

    Attributes:
        block: The block that integrates it.
        solution: Its posterior.
        batch: The sizes of its batch dimensions.
        event: The shape of one event, ``to_event`` included.
        weights: The probability of each combination of discrete values; None where there is one.
            # (elements, cells)
    """

    block: ConjugateBlock
    solution: ConjugateSolution
    batch: tuple[int, ...]
    event: torch.Size
    weights: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """That of the latent's values."""
        return self.block.groups[0].value.dtype

    @property
    def _chi(self) -> Tensor:
        """χ of each element, of its batch and then of its event. # (elements, cells, P)"""
        chi = self.solution.chi
        cells = 1 if self.weights is None else self.weights.shape[-1]
        return chi.expand(chi.shape[0], cells, chi.shape[-1])

    def means(self) -> Tensor:
        """The mean of each element in each cell. # (elements, cells, *event of one element)"""
        return self.solution.kernel.of(self._chi).mean

    def mean(self) -> Tensor:
        """E[λ]. # (*batch, *event)"""
        return self._mixed(self.means()).reshape((*self.batch, *self.event)).to(self.dtype)

    def covariance(self) -> Tensor:
        """Variances of numbers, covariances of events. # (*batch,) or (*batch, D, D)

        Of matrices those of their elements, row by row. # (*batch, D², D²)
        """
        kernel, chi, mean = self.solution.kernel, self._chi, self.means()
        if kernel.support == "matrix":
            each = _covariance_of_elements(chi[..., 0, None, None], mean)
            mean = mean.flatten(-2)
        elif kernel.event_dim:
            each = torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
            each = each / (chi.sum(-1) + 1)[..., None, None]
        else:
            each, mean = kernel.of(chi).variance[..., None, None], mean.unsqueeze(-1)
        rows, cells, size = torch.Size(self.batch).numel(), chi.shape[1], mean.shape[-1]
        # What is one event lies together, and is independent given the discrete latents.
        own = len(chi) // max(rows, 1)
        mean = mean.reshape(rows, own, cells, size).transpose(1, 2).reshape(rows, cells, -1)
        each = each.reshape(rows, own, cells, size, size).permute(0, 2, 3, 4, 1)
        each = torch.diag_embed(each).permute(0, 1, 4, 2, 5, 3)
        each = each.reshape(rows, cells, own * size, own * size)
        weights = mean.new_ones(rows, 1)
        if self.weights is not None:
            weights = self.weights.reshape(rows, own, cells)[:, 0]
        off = mean - (weights.unsqueeze(-1) * mean).sum(1, keepdim=True)
        each = each + off.unsqueeze(-1) * off.unsqueeze(-2)
        out = (weights[..., None, None] * each).sum(1)
        shape = out.shape[1:] if self.event else ()
        return out.reshape((*self.batch, *shape)).to(self.dtype)

    def _mixed(self, x: Tensor) -> Tensor:
        if self.weights is None:
            return x[:, 0]
        weights = self.weights.reshape(self.weights.shape + (1,) * (x.dim() - 2))
        return (weights * x).sum(1)

    def marginal(self) -> Any:
        """A distribution over the batch, with the arguments of the prior's class."""
        kernel, joined = self.solution.kernel, self.block.groups[0].event_dims
        own = self.event[:joined]
        cells: tuple[int, ...] = () if self.weights is None else (self.weights.shape[-1],)
        distribution, arguments = kernel.arguments(self._chi)
        tail = {n: a.shape[2:] for n, a in arguments.items()}
        laid = {}
        for name, a in arguments.items():
            a = a.reshape(*self.batch, *own, a.shape[1], *tail[name])
            if cells:  # cells stand before what one draw of them decides
                a = a.movedim(len(self.batch) + len(own), len(self.batch))
            else:
                a = a.squeeze(len(self.batch) + len(own))
            laid[name] = a.to(self.dtype)
        part = distribution(**laid)
        part = part.to_event(joined) if joined else part
        if self.weights is None:
            return part
        rows = max(torch.Size(self.batch).numel(), 1)
        per_row = self.weights.reshape(rows, -1, *cells)[:, 0]
        chosen = dist.Categorical(probs=per_row.reshape((*self.batch, *cells)).to(self.dtype))
        return dist.MixtureSameFamily(chosen, part)

    def chosen(self, by_cell: Tensor, cells: Tensor | None) -> Tensor:
        """What belongs to the discrete values of each element. # (n or 1, elements, ...)

        Args:
            by_cell: # (elements, cells, ...)
            cells: The number of the combination. # (n, elements)
        """
        if cells is None or by_cell.shape[1] == 1:
            return by_cell[:, 0].unsqueeze(0)
        return by_cell[torch.arange(by_cell.shape[0], device=cells.device), cells]

    def drawn(self, n: int, generator: torch.Generator | None, cells: Tensor | None) -> Tensor:
        """Draws, given the discrete latents. # (n, *batch, *event)"""
        chi = self.chosen(self._chi, cells)
        chi = chi.expand(n, *chi.shape[1:]).contiguous()
        out = drawn(self.solution.kernel, chi, generator)
        return out.reshape(n, *self.batch, *self.event).to(self.dtype)


def _covariance_of_elements(df: Tensor, mean: Tensor) -> Tensor:
    """Cov(Λ_ij, Λ_kl) = (E_ik E_jl + E_il E_jk) / ν of a Wishart with mean E. # (..., D², D²)"""
    straight = torch.einsum("...ik,...jl->...ijkl", mean, mean)
    crossed = torch.einsum("...il,...jk->...ijkl", mean, mean)
    return (straight + crossed).flatten(-4, -3).flatten(-2) / df


@dataclass(frozen=True, eq=False)
class ConjugateFaces:
    """All conjugate latents of a posterior.

    Attributes:
        graph: The factor graph.
        solved: The posterior of the latent of each group that stands for one.
        cells: Per group the probability of every cell. # (members, *sizes)
    """

    graph: FactorGraph
    solved: Mapping[int, ConjugateSolution]
    cells: Any

    @cached_property
    def places(self) -> dict[str, int]:
        """For each latent the number of its group, in model order."""
        found = {n: g for g in self.solved for n in latents_in(self.graph.groups[g])}
        return {n: found[n] for n in self.graph.structure.sites if n in found}

    def site(self, name: str) -> ConjugateSite:
        """A latent by its name."""
        g = self.places[name]
        block, solution = self._block(name), self._solution(name)
        info, structure = self.graph.structure.sites[name], self.graph.structure
        own = {structure.plates[p].dim: p for p in info.plates}
        plates = (own.get(d) for d in range(-info.batch_dim, 0))
        batch = tuple(1 if p is None else structure.plates[p].size for p in plates)
        group = block.groups[0]
        event = group.value.shape[1 + len(group.sizes) :]
        weights = None
        if block.scope:
            states = torch.Size(block.states).numel()
            cells = self.cells[g]
            if len(cells) > 1:  # a member for each latent
                nested = self.graph.groups[g].nested
                assert isinstance(nested, StackedConjugates)
                cells = cells[nested.place[name]]
            weights = cells.reshape(-1, states)[block.element_of_row(0, events=True)]
        return ConjugateSite(block, solution, batch, event, weights)

    @torch.no_grad()
    def entropy(self) -> float:
        """The expected entropy in nats given the discrete latents."""
        total = 0.0
        for name in self.places:
            site = self.site(name)
            entropy = site.solution.entropy()
            weights = torch.ones_like(entropy) if site.weights is None else site.weights
            often = site.block.weight
            if often is not None:
                each = often.expand(site.block.sizes).reshape(-1, 1)
                weights = weights * each[site.block.element_of_row(0, events=True)]
            total += float((weights * entropy).sum())
        return total

    @torch.no_grad()
    def mode(self, codes: Codes) -> dict[str, Tensor]:
        """The mean of each latent given the discrete ones, at places in their supports."""
        out = {}
        for name in self.places:
            site = self.site(name)
            cells = self._cells(name, {z: c.unsqueeze(0) for z, c in codes.items()}, 1)
            chosen = site.chosen(site.means(), cells)[0]
            out[name] = chosen.reshape((*site.batch, *site.event)).to(site.dtype)
        return out

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None, codes: Codes) -> dict[str, Tensor]:
        """Draws of all latents, given those of the discrete ones. # (n, *batch, *event) each

        Args:
            n: Number of draws.
            generator: Source of randomness; torch's global state if None.
            codes: The places of the discrete latents' drawn values. # (n, *plates)
        """
        return {
            name: self.site(name).drawn(n, generator, self._cells(name, codes, n))
            for name in self.places
        }

    def by_group(self, drawn: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Draws of all latents, their elements in order. # (n, elements, *event of one) by group

        Args:
            drawn: # (n, *batch, *event) each
        """
        out = {}
        for name, g in self.places.items():
            values, count = drawn[name], self._block(name).count
            event = values.shape[values.dim() - self.solved[g].kernel.event_dim :]
            out[g] = values.reshape(len(values), count, *event)
        return out

    def _cells(self, name: str, codes: Codes, n: int) -> Tensor | None:
        """The combination of discrete values of each element. # (n, elements)"""
        block = self._block(name)
        if not block.scope:
            return None
        device = block.groups[0].value.device
        place = torch.zeros((n, *block.sizes), dtype=torch.long, device=device)
        for z, states in zip(block.scope, block.states, strict=True):
            own = self.graph.latents[z].plates
            shape = [s if p in own else 1 for p, s in zip(block.plates, block.sizes, strict=True)]
            place = place * states + codes[z].reshape(n, *shape)
        return place.reshape(n, -1)[:, block.element_of_row(0, events=True)]

    def _block(self, name: str) -> ConjugateBlock:
        return block_of(self.graph.groups[self.places[name]], name)

    def _solution(self, name: str) -> ConjugateSolution:
        g = self.places[name]
        block = self.graph.groups[g].nested
        if isinstance(block, StackedConjugates):
            return block.solution_of(self.solved[g], name)
        return self.solved[g]


def latents_in(group: Group) -> Sequence[str]:
    """The conjugate latents that a group integrates."""
    block = group.nested
    if isinstance(block, StackedConjugates):
        return block.latents
    block = block.conjugate if isinstance(block, ScaledBlock) else block
    return (block.latent,) if isinstance(block, ConjugateBlock) else ()


def block_of(group: Group, name: str) -> ConjugateBlock:
    """The block of one of these."""
    block = group.nested
    if isinstance(block, StackedConjugates):
        return block.one(name)
    block = block.conjugate if isinstance(block, ScaledBlock) else block
    assert isinstance(block, ConjugateBlock)
    return block


def stacked_or_alone(site: str, answers: list[Tensor]) -> Tensor:
    """The answer for a name, or those for a glob, along a new first dimension."""
    if len(answers) == 1 and not is_glob(site):
        return answers[0]
    if len({a.shape for a in answers}) > 1:
        raise UsageError(_of_shapes(site))
    return torch.stack(answers)


def one_marginal(site: str, sites: list[ConjugateSite]) -> Any:
    """The distribution of a latent, or of those that a glob means, along a new first dimension."""
    if len(sites) == 1 and not is_glob(site):
        return sites[0].marginal()
    first = sites[0]
    if any(
        (s.batch, s.event, s.solution.kernel) != (first.batch, first.event, first.solution.kernel)
        or (s.weights is None) != (first.weights is None)
        for s in sites
    ):
        raise UsageError(_of_shapes(site))
    chi = torch.cat([s.solution.chi for s in sites])
    weights = None
    if first.weights is not None:
        weights = torch.cat([s.weights for s in sites if s.weights is not None])
    solution = replace(first.solution, given=chi, place=None, few=None)
    return replace(
        first, solution=solution, batch=(len(sites), *first.batch), weights=weights
    ).marginal()


def _of_shapes(site: str) -> str:
    return message(
        site,
        "the latents that it means differ in shape or in their prior's family.",
        "the answers of a glob are stacked",
        ["ask for them one by one"],
    )
