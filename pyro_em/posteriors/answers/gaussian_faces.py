"""The Gaussian latents of a posterior as users ask for them, by name: moments, marginals, draws.

Given the discrete latents they are jointly Gaussian; `pyro_em.posteriors.answers.gaussian_site` says
what one of them is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.globs import is_glob, listed, matching, refuse_gaps, unknown
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.answers.gaussian_site import GaussianSite
from pyro_em.posteriors.answers.names import gaussian_names, names_of, observed_steps
from pyro_em.posteriors.answers.refusals import discrete
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.gaussian_sites import taken
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.sampling import AT_ONCE
from pyro_em.posteriors.scales.scaled import ScaledBlock
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian

Codes = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianFaces:
    """All Gaussian latents of a posterior.

    Attributes:
        graph: The factor graph.
        solved: The posterior of the latents that each group integrates.
        cells: Per group the probability of every cell. # (members, *sizes)
        others: Names of latents for which others answer, for messages.
    """

    graph: FactorGraph
    solved: Mapping[int, Integrated]
    cells: Sequence[Tensor]
    others: tuple[str, ...] = ()

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """For each latent, in model order, the numbers of its group and of its site there."""
        found = {
            name: (g, i) for g in self.solved for name, i in _block(self.graph, g).latents.items()
        }
        return {name: found[name] for name in gaussian_names(self.graph) if name in found}

    def names(self, where: str, pattern: str) -> list[str] | None:
        """The latents that a glob matches, in order of time; None for a name.

        Raises:
            UsageError: If it matches none.
        """
        if pattern in self.places or not is_glob(pattern):
            return None
        found = matching(pattern, self.places)
        if not found:
            if matching(pattern, names_of(self.graph)):
                raise UsageError(discrete(where, pattern))
            raise unknown(pattern, [*self.places, *self.others], "Gaussian latents")
        refuse_gaps(pattern, observed_steps(self.graph))
        return found

    def site(self, where: str, name: str) -> GaussianSite:
        """A latent by its name.

        Raises:
            UsageError: If there is none of this name.
        """
        if name not in self.places:
            if name in names_of(self.graph) or name in self.graph.latents:
                raise UsageError(discrete(where, name))
            raise UsageError(
                message(
                    f"site '{name}'",
                    "it is no Gaussian latent of this posterior; those are: "
                    f"{listed([*self.places, *self.others])}.",
                    "means and covariances are those of continuous latents with an exact posterior",
                    ["ask for one of them"],
                )
            )
        g, i = self.places[name]
        block, group = _block(self.graph, g), self.group(name)
        plates, batch = self._plates(name), self.batch(name)
        first, weights = block.first_element(name), self.weights(g, i)
        if weights is not None:
            weights = weights[:, first : first + math.prod(batch)]
        return GaussianSite(group, g, i, first, self.solved[g], plates, batch, weights, block.scope)

    def group(self, name: str) -> Group:
        """The site of a latent."""
        g, i = self.places[name]
        group = _block(self.graph, g).groups[i]
        return taken(group, [group.members.index(name)])

    def batch(self, name: str) -> tuple[int, ...]:
        """The sizes of a latent's batch dimensions."""
        return tuple(1 if p is None else self.graph.dim_size(p) for p in self._plates(name))

    def _plates(self, name: str) -> tuple[str | None, ...]:
        """For each batch dimension of a latent, the plate's name or None."""
        info = self.graph.structure.sites[name]
        own = {self.graph.structure.plates[p].dim: p for p in info.plates}
        return tuple(own.get(d) for d in range(-info.batch_dim, 0))

    @torch.no_grad()
    def entropy(self) -> float:
        """The expected entropy in nats given the discrete latents; −inf at a variance of zero."""
        total = 0.0
        for g, solution in self.solved.items():
            entropy = solution.entropy() * self._often(g)  # (cells, blocks)
            if solution.cells == 1:
                total += float(entropy.sum())
                continue
            block = _block(self.graph, g)
            weights = torch.zeros_like(entropy)
            for i in set(block.latents.values()):
                each = self.weights(g, i)
                assert each is not None
                at = block.layout.block_of_element(i)
                weights[:, at] = each.to(weights)
            total += float(torch.where(weights == 0, 0.0, weights * entropy).sum())
        return total

    def _often(self, g: int) -> Tensor | float:
        """How often each block of a group counts. # (blocks,)"""
        block = self.graph.groups[g].nested
        if not isinstance(block, ScaledBlock) or block.conjugate.weight is None:
            return 1.0
        each = block.conjugate.weight.expand(block.sizes).reshape(-1)
        return each[block.gaussian.element_of_block.to(each.device)]

    def mode(self, codes: Codes) -> dict[str, Tensor]:
        """The mean of each latent given the discrete ones.

        Args:
            codes: The place of each discrete latent's value in its support. # (*plates,)
        """
        out = {}
        for name in self.places:
            site = self.site("mode", name)
            cells = self._cells(site, {z: c.unsqueeze(0) for z, c in codes.items()}, 1)
            out[name] = site.chosen(site.means().unsqueeze(0), cells)[0].clone()
        return out

    def sample(
        self,
        n: int,
        generator: torch.Generator | None,
        codes: Codes,
        scales: Mapping[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Joint draws of all latents, given those of the discrete ones. # (n, *batch, *event) each

        Args:
            n: Number of draws.
            generator: Source of randomness; torch's global state if None.
            codes: The places of the discrete latents' drawn values. # (n, *plates)
            scales: Draws of the scale that the latents of a group share, by its number.
                # (n, elements, *event)
        """
        sites = {name: self.site("sample", name) for name in self.places}
        out = {name: s.group.value.new_empty((n, *s.batch, *s.event)) for name, s in sites.items()}
        for g, solution in self.solved.items():
            own = [s for s in sites.values() if s.place == g]
            order = {i: k for k, i in enumerate(sorted({s.number for s in own}))}
            size = max(1, solution.cells * solution.layout.vector_size)
            portion = max(1, AT_ONCE // size)
            for begin in range(0, n, portion):
                end = min(begin + portion, n)
                if isinstance(solution, ScaledGaussian) and scales is not None:
                    own_scales = scales[g][begin:end]
                    drawn = solution.sample_given(end - begin, generator, own_scales)
                else:
                    drawn = solution.sample(end - begin, generator)
                for site in own:
                    values = drawn[order[site.number]][:, :, site.own]
                    part = {z: c[begin:end] for z, c in codes.items()}
                    cells = self._cells(site, part, end - begin)
                    out[site.name][begin:end] = site.chosen(values, cells)
        return out

    def weights(self, g: int, site: int) -> Tensor | None:
        """The probabilities of the discrete values that a site is given. # (cells, elements)"""
        cells = self.solved[g].cells
        if cells == 1:
            return None
        rows = self.cells[g].reshape(-1, cells)
        return rows[_block(self.graph, g).element_of_row(site).to(rows.device)].T

    def _cells(self, site: GaussianSite, codes: Codes, n: int) -> Tensor | None:
        """The combination of discrete values of each element. # (n, elements)"""
        rows = self.cells_of_rows(site.place, site.number, codes, n)
        return None if rows is None else rows[:, site.own]

    def cells_of_rows(self, g: int, i: int, codes: Codes, n: int) -> Tensor | None:
        """The combination of discrete values of each row of a site; None where there is one.

        Args:
            g: The number of the graph's group.
            i: The number of the site in its block.
            codes: The places of the discrete latents' drawn values. # (n, *plates)
            n: Number of draws.

        Returns:
            # (n, rows)
        """
        if self.solved[g].cells == 1:
            return None
        block = _block(self.graph, g)
        device = block.groups[i].value.device
        place = torch.zeros((n, *block.sizes), dtype=torch.long, device=device)
        for z, states in zip(block.scope, block.states, strict=True):
            own = self.graph.latents[z].plates
            shape = [s if p in own else 1 for p, s in zip(block.plates, block.sizes, strict=True)]
            place = place * states + codes[z].reshape(n, *shape)
        return place.reshape(n, -1)[:, block.element_of_row(i).to(device)]


def _block(graph: FactorGraph, g: int) -> GaussianBlock:
    block = graph.groups[g].nested
    block = block.gaussian if isinstance(block, ScaledBlock) else block
    assert isinstance(block, GaussianBlock)
    return block
