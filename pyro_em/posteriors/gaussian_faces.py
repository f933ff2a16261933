"""The Gaussian latents of a posterior as users ask for them: moments, marginals, draws.

Given the discrete latents they are jointly Gaussian. Where discrete values change them, the moments
are those of the mixture, with the probabilities of the values as weights,

    E[h] = Σ_k w_k m_k,     Cov(h) = Σ_k w_k (S_k + (m_k − E[h]) (m_k − E[h])ᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.globs import is_glob, listed, matching, meant, refuse_gaps, unknown
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.posteriors.gaussian_sites import taken
from pyro_em.posteriors.gaussian_steps import Solved
from pyro_em.posteriors.integrated import Integrated
from pyro_em.posteriors.names import gaussian_names, names_of, observed_steps, own_name
from pyro_em.posteriors.sampling import AT_ONCE
from pyro_em.updates.gaussian_rows import event_shape

Codes = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class GaussianSite:
    """One Gaussian latent of a posterior.

    Attributes:
        group: Its site.
        place: The number of the graph's group that integrates it.
        number: Its number among the sites of that group's block.
        first: The number of its first element among those of that site.
        solution: The posterior of the block.
        plates: For each batch dimension of the site, the plate's name or None.
        batch: The sizes of these.
        weights: The probability of each combination of discrete values, for each of its elements;
            None where there is one combination. # (cells, elements)
        scope: The discrete latents that make them up.
    """

    group: Group
    place: int
    number: int
    first: int
    solution: Integrated
    plates: tuple[str | None, ...]
    batch: tuple[int, ...]
    weights: Tensor | None
    scope: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The site's name."""
        return self.group.members[0]

    @property
    def event(self) -> torch.Size:
        """The shape of one event, ``to_event`` included."""
        return event_shape(self.group)

    @property
    def width(self) -> int:
        """How many numbers that is."""
        return self.event.numel()

    @property
    def dtype(self) -> torch.dtype:
        """That of the latent's values."""
        return self.group.value.dtype

    @property
    def elements(self) -> Tensor:
        """The numbers of its elements. # (*batch,)"""
        count = math.prod(self.batch)
        own = torch.arange(count, device=self.group.value.device).reshape(self.batch)
        return own + self.first

    @property
    def own(self) -> slice:
        """The places of its elements."""
        return slice(self.first, self.first + math.prod(self.batch))

    def means(self) -> Tensor:
        """The mean of each element under each combination. # (cells, elements, D)"""
        return self.solution.mean(self.number)[:, self.own]

    def mean(self) -> Tensor:
        """E[h]. # (*batch, *event)"""
        mixed = _mixed(self.means(), self.weights)
        return mixed.reshape((*self.batch, *self.event)).to(self.dtype)

    def covariances(self) -> Tensor:
        """The covariance of each element under each combination. # (cells, elements, D, D)"""
        each = self.elements.reshape(-1)
        return self.solution.covariance_of(self.number, each, self.number, each)

    def marginal(self) -> Any:
        """A distribution over the batch; see `Posterior.marginal`."""
        mean = self.means().transpose(0, 1)  # (elements, cells, D)
        covariance = self.covariances().transpose(0, 1)
        if self.weights is None:
            mean, covariance = mean[:, 0], covariance[:, 0]
        lead = (*self.batch, *mean.shape[1:-1])
        # Variances of zero are answers too: no argument is validated.
        part: Any
        if self.event:
            tril = factors_of(covariance).reshape(*lead, *covariance.shape[-2:])
            part = dist.MultivariateNormal(
                mean.reshape(*lead, -1).to(self.dtype),
                scale_tril=tril.to(self.dtype),
                validate_args=False,
            )
        else:
            deviation = covariance[..., 0, 0].clamp(min=0).sqrt().reshape(lead)
            loc = mean.reshape(lead).to(self.dtype)
            part = dist.Normal(loc, deviation.to(self.dtype), validate_args=False)
        if self.weights is None:
            return part
        shape = (*self.batch, self.solution.cells)
        weights = self.weights.T.reshape(shape)
        chosen = dist.Categorical(probs=weights.to(self.dtype))
        return dist.MixtureSameFamily(chosen, part, validate_args=False)

    def chosen(self, by_cell: Tensor, cells: Tensor | None) -> Tensor:
        """What belongs to the discrete values of each element. # (n, *batch, *event)

        Args:
            by_cell: # (n, cells, elements, D)
            cells: The number of the combination. # (n, elements)
        """
        if cells is None:
            out = by_cell[:, 0]
        else:
            at = cells[:, None, :, None].expand(-1, 1, by_cell.shape[2], by_cell.shape[3])
            out = by_cell.gather(1, at)[:, 0]
        return out.reshape(-1, *self.batch, *self.event).to(self.dtype)


def covariance(a: GaussianSite, b: GaussianSite) -> Tensor:
    """The covariance of the elements of two sites; see `Posterior.covariance`."""
    shape = _common(a, b)
    first = a.elements.expand(shape).reshape(-1)
    second = b.elements.expand(shape).reshape(-1)
    tails = [(site.width,) if site.event else () for site in (a, b)]
    form = (*shape, *tails[0], *tails[1])
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a.place == b.place:
        out = a.solution.covariance_of(a.number, first, b.number, second)
    else:  # given the discrete latents they are independent
        out = first.new_zeros((1, *first.shape, a.width, b.width), dtype=torch.float64)
    if a.weights is not None and b.weights is not None:
        if a.scope != b.scope:
            raise UsageError(_two_scopes(a, b))
        weights = a.weights[:, first - a.first]
        u = a.solution.mean(a.number)[:, first]
        v = b.solution.mean(b.number)[:, second]
        u, v = u - _mixed(u, weights), v - _mixed(v, weights)
        mixed = _mixed(out + u.unsqueeze(-1) * v.unsqueeze(-2), weights)
    else:
        mixed = out[0]
    return mixed.reshape(form).to(dtype)


def _two_scopes(a: GaussianSite, b: GaussianSite) -> str:
    return message(
        f"covariance('{a.name}', '{b.name}')",
        f"'{a.name}' depends on discrete {listed(a.scope)}, and '{b.name}' on {listed(b.scope)}.",
        "their covariance needs the joint distribution of all these",
        ["draw jointly (sample(n), em.predictive), and take the covariance of the draws"],
    )


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
    solved: Solved
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
            entropy = solution.entropy()  # (cells, blocks)
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

    def sample(self, n: int, generator: torch.Generator | None, codes: Codes) -> dict[str, Tensor]:
        """Joint draws of all latents, given those of the discrete ones. # (n, *batch, *event) each

        Args:
            n: Number of draws.
            generator: Source of randomness; torch's global state if None.
            codes: The places of the discrete latents' drawn values. # (n, *plates)
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


def refuse_gaussian(graph: FactorGraph, where: str, site: str | None) -> None:
    """Refuse to make a table of probabilities of a Gaussian latent.

    Args:
        graph: The factor graph.
        where: The method that was called.
        site: What was asked for: a name, or a glob.

    Raises:
        UsageError: If it means Gaussian latents.
    """
    names = gaussian_names(graph)
    if site is None or not names or own_name(graph, site) in graph.latents:
        return
    found = meant(site, names)
    if not found or matching(site, names_of(graph)):
        return
    raise UsageError(
        message(
            f"{where}('{site}')",
            f"{listed(found)} {'is a Gaussian latent' if len(found) == 1 else 'are Gaussian latents'}.",
            "the posterior is a density, which no table of probabilities holds",
            [
                f"ask for moments: mean('{site}'), covariance('{site}')",
                f"ask for the distribution: marginal('{found[0]}')",
            ],
        )
    )


def regrouped_solutions(
    graph: FactorGraph, solved: Solved, other: FactorGraph
) -> dict[int, Integrated] | None:
    """The solutions of a graph by the numbers of the groups of another; None where these differ.

    Args:
        graph: That of the solutions.
        solved: By its groups.
        other: One of the same model.
    """
    by_latents = {tuple(_block(graph, g).latents): s for g, s in solved.items()}
    out = {}
    for g, group in enumerate(other.groups):
        if group.nested is not None:
            solution = by_latents.pop(tuple(_block(other, g).latents), None)
            if solution is None:
                return None
            out[g] = solution
    return None if by_latents else out


def _block(graph: FactorGraph, g: int) -> GaussianBlock:
    block = graph.groups[g].nested
    assert isinstance(block, GaussianBlock)
    return block


def discrete(where: str, site: str) -> str:
    """What somebody is told who asks for the moments of a discrete latent."""
    return message(
        f"{where}('{site}')",
        f"'{site}' is a discrete latent.",
        "its posterior is a table of probabilities, from which the mean of any function follows",
        [f"ask for its probabilities: probs('{site}')"],
    )


def _mixed(x: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_k w_k x_k. # (elements, ...)

    Args:
        x: # (cells, elements, ...)
        weights: # (cells, elements or 1)
    """
    if weights is None:
        return x[0]
    return (weights.reshape(*weights.shape, *(1,) * (x.dim() - 2)) * x).sum(0)


def _common(a: GaussianSite, b: GaussianSite) -> torch.Size:
    """The batch dimensions of two sites together.

    Raises:
        UsageError: If two plates share a dimension, so that no element belongs to one of the other.
    """
    n = max(len(a.plates), len(b.plates))
    for d in range(-n, 0):
        both = [s.plates[d] for s in (a, b) if -d <= len(s.plates) and s.plates[d] is not None]
        if len(set(both)) > 1:
            raise UsageError(
                message(
                    f"covariance('{a.name}', '{b.name}')",
                    f"'{a.name}' is in plate '{both[0]}', and '{b.name}' in plate '{both[1]}'.",
                    "the elements of two plates of one dimension do not belong to each other",
                    [
                        "ask for sites of the same plates",
                        "draw jointly (sample(n), em.predictive), and take the covariance of the draws",
                    ],
                )
            )
    return torch.Size(torch.broadcast_shapes(a.batch, b.batch))


def factors_of(covariance: Tensor) -> Tensor:
    """Lower factors of covariances, which may be singular. # (..., D, D)"""
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed.any()):
        return cholesky
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    upper = torch.linalg.qr(root.mT).R  # root rootᵀ = Rᵀ R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return torch.where((failed != 0)[..., None, None], (upper * sign.unsqueeze(-1)).mT, cholesky)
