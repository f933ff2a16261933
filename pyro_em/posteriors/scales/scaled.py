"""The scaled block: Gaussian latents all of whose spreads are multiples of one conjugate latent.

With g the precision, or the precision matrix, that the Normal sites of a Gaussian block share (a
Normal–Gamma, a Normal–Wishart, a regression with conjugate priors), the latents h are Gaussian given g,
about a mean m that does not depend on it, and what is left of the data y when they are integrated is

    log p(y | g) = Σ Δχ·t(g) + const,     Δχ of the residuals at m, of latents without their count,

so that for g the block is one more child (`pyro_em.posteriors.conjugates.conjugate`). The constant is
taken where g is at its posterior mean, where no large squares meet. In the M-step h has its moments
there too,

    E[g (y − C h)²] = E[g] ((y − C m)² + C S Cᵀ),     S = Cov(h | g = E[g]),

and by itself h is of a Student distribution about m.

Source: Gelman et al., "Bayesian Data Analysis" (3rd ed. 2013), sections 3.3, 3.6 and 14.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_cells import rows_of
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock, piece
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.gaussians.linear_gaussian import GaussianSolution
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.beliefs import Moments
from pyro_em.updates.expectations.conjugate_beliefs import ScaledMoments, wide
from pyro_em.updates.expectations.gaussian_rows import is_matrix, weights_of

Arguments = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ScaledSolution:
    """The posterior of a scale and of the Gaussian latents that have it.

    Attributes:
        conjugate: That of the scale, alone.
        gaussian: That of the Gaussian latents, or what a user gave in its place.
        constant: Nats besides, over the table. # (1, *sizes or 1s, *states or 1s)
    """

    conjugate: ConjugateSolution
    gaussian: Integrated
    constant: Tensor

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior that another one is."""
        if self is other or not isinstance(other, ScaledSolution):
            return self is other
        return self.conjugate.is_of(other.conjugate) and self.gaussian.is_of(other.gaussian)


@dataclass(frozen=True, eq=False)
class ScaledBlock:
    """Gaussian latents, the scale that all their sites share, and what else reads that.

    Attributes:
        gaussian: The sites that the Gaussian latents connect.
        conjugate: The scale's own site, then these sites in the same order, then all others that read
            it; its table is the block's.
    """

    gaussian: GaussianBlock
    conjugate: ConjugateBlock

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """See `pyro_em.graph.factors.Nested`."""
        own = self.conjugate
        return (*self.gaussian.groups, own.groups[0], *(own.groups[i] for i in own.summed))

    @cached_property
    def traced(self) -> tuple[Group, ...]:
        """The sites as a run with Gaussian latents at zero and the scale at its unit shows them."""
        own = self.conjugate
        return (*self.gaussian.traced, own.traced[0], *(own.traced[i] for i in own.summed))

    @property
    def plates(self) -> tuple[str, ...]:
        """Plates of the table."""
        return self.conjugate.plates

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their sizes."""
        return self.conjugate.sizes

    @property
    def scope(self) -> tuple[str, ...]:
        """Discrete latents of the table."""
        return self.conjugate.scope

    @property
    def states(self) -> tuple[int, ...]:
        """How many values each has."""
        return self.conjugate.states

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return "Gaussian blocks with a conjugate scale"

    @cached_property
    def counted(self) -> GaussianBlock:
        """The Gaussian sites as they count in one of the rows that a weight stands for."""
        if self.conjugate.weight is None:
            return self.gaussian
        groups = tuple(replace(g, scale=(1.0,)) for g in self.gaussian.groups)
        return replace(self.gaussian, groups=groups).over(self.plates, self.sizes)

    # ------------------------------------------------------------------ the E-step

    def solve(self, arguments: Arguments) -> ScaledSolution:
        """The posterior of all latents, for each state of the scope.

        Raises:
            DegenerateError: If an observation has no noise.
        """
        unit = _solved(self.counted, arguments)
        deltas = self._deltas(unit, arguments)
        own = self.conjugate
        given = [own.readings[i].summed(d) for i, d in enumerate(deltas)]
        scale = own.solve(arguments, sum(given[1:], given[0]))
        at = _solved(self.counted, self._at_mean(scale, arguments)[0])
        table = self.counted.table(at)
        t = own.kernel.at_mean(scale.t.detach())
        for i, delta in enumerate(deltas):
            there = (delta * own.readings[i].taken(t)).sum(-1)
            rows = there.expand(own.rows_of_site(i + 1), there.shape[1])
            summed = own.onto_table(i + 1, rows)
            table = table - summed.expand(len(summed), math.prod(self.states)).reshape(table.shape)
        return ScaledSolution(scale, self._gaussian(scale, at), table)

    def given_scale(self, scale: ConjugateSolution, arguments: Arguments) -> Integrated:
        """The Gaussian latents where something else stands for the scale.

        Args:
            scale: What stands for it.
            arguments: Those of all sites.
        """
        return self._gaussian(scale, _solved(self.counted, self._at_mean(scale, arguments)[0]))

    def _gaussian(self, scale: ConjugateSolution, at: GaussianSolution) -> ScaledGaussian:
        readings = {i: self.conjugate.readings[i] for i in set(self.gaussian.latents.values())}
        return ScaledGaussian(at, scale, readings, self._count)

    @property
    def _count(self) -> float:
        """What the log density of a number, or a vector, has of the scale's first statistic."""
        return 1.0 if self.conjugate.kernel.support == "matrix" else 0.5

    def _deltas(self, unit: GaussianSolution, arguments: Arguments) -> list[Tensor]:
        """Δχ of each Gaussian site's rows. # (rows, cells or 1, P) each"""
        out, block = [], self.conjugate
        for i in range(len(self.gaussian.groups)):
            group, read = block.groups[i + 1], block.reads[i]
            own = wide(block.of_site(i + 1, arguments))
            matrix = is_matrix(group)
            residual = unit.residuals(i).movedim(0, -1)  # (rows, D, cells)
            rows = residual.movedim(-1, 1) if matrix else residual.flatten(0, 1)
            name = read.pair.argument
            spread = rows_of(own[name], group, 2 if matrix else 0)
            delta = read.pair.delta(rows, {"loc": torch.zeros_like(rows), name: spread})
            weight = block.weights_of_cells(i + 1)
            if weight is not None:
                weight = rows_of(weight, group)
                delta = torch.where(weight.unsqueeze(-1) == 0, 0.0, weight.unsqueeze(-1) * delta)
            if group.role is Role.GAUSSIAN:  # the posterior of the latent has as many
                delta = torch.cat([torch.zeros_like(delta[..., :1]), delta[..., 1:]], -1)
            out.append(delta)
        return out

    def _at_mean(
        self, scale: ConjugateSolution, arguments: Arguments
    ) -> tuple[dict[str, Tensor], tuple[Group, ...]]:
        """Arguments of all sites where the scale is at its mean, and the Gaussian sites there."""
        groups, own = [], dict(arguments)
        for i, group in enumerate(self.counted.groups):
            site = replace(group, arguments=self.gaussian.of_site(i, arguments))
            t = self.conjugate.readings[i].taken(scale.t.detach())
            site = self.conjugate.at_mean(i + 1, site, t)
            groups.append(site)
            name = self.conjugate.reads[i].pair.argument
            own[piece(group.members[0], name)] = site.arguments[name]
        return own, tuple(groups)

    def table(self, solution: ScaledSolution) -> Tensor:
        """The log evidence in nats, per element of the plates and state of the scope.

        Returns:
            # (1, *sizes, *states)
        """
        return self.conjugate.table(solution.conjugate) + solution.constant

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    # ------------------------------------------------------------------ the M-step

    def believed(
        self,
        solution: ScaledSolution,
        arguments: Arguments,
        counts: Tensor,
        complete: bool = True,
    ) -> list[tuple[Group, Tensor]]:
        """The sites with what is known of the latents, and how often each cell counts.

        Args:
            solution: The posterior of the latents.
            arguments: At which it was computed.
            counts: The posterior of the scope. # (1, *sizes, *states)
            complete: Whether sites are as an M-step wants them; otherwise as a bound does.
        """
        scale = solution.conjugate
        _, groups = self._at_mean(scale, arguments)
        block = replace(self.counted, groups=groups).over(self.plates, self.sizes)
        own = {piece(g.members[0], a): t for g in groups for a, t in g.arguments.items()}
        out = []
        for i, (site, weight) in enumerate(
            block.believed(solution.gaussian, own, counts, complete)
        ):
            moments = site.belief
            assert isinstance(moments, Moments)
            if site.raw_params and complete:  # the model is run at its unit
                name = self._spread_of(i)
                unit = self.gaussian.of_site(i, arguments)[name]
                belief = ScaledMoments.of(moments, name, site.arguments[name], unit)
                held = {**site.arguments, name: unit}
                site = replace(site, arguments=held, belief=belief)
            elif not complete:
                site = replace(site, belief=replace(moments, constant=self._constant(i, scale)))
            out.append((site, weight))
        return out + self.conjugate.believed(scale, arguments, counts, complete)

    def _spread_of(self, i: int) -> str:
        """The argument of a Gaussian site that reads the scale."""
        return self.conjugate.reads[i].pair.argument

    def _constant(self, i: int, scale: ConjugateSolution) -> Tensor:
        """What E[log p] of each row has besides that where the scale is at its mean. # (cells, rows)"""
        kernel, group = self.conjugate.kernel, self.conjugate.groups[i + 1]
        off = (scale.t - kernel.at_mean(scale.t))[..., 0]
        rows = self.conjugate.readings[i].taken(off) * self._count
        if is_matrix(group):
            return rows.T * (1 if kernel.support == "matrix" else group.value.shape[-1])
        each = rows.T.expand(-1, self.conjugate.rows_of_site(i + 1))
        each = each.reshape(len(each), math.prod(group.sizes[: group.n_plates]), -1)
        if group.elements is not None:
            each = torch.where(weights_of(self.gaussian.groups[i]) > 0, each, 0.0)
        return each.sum(-1)


def _solved(block: GaussianBlock, arguments: Arguments) -> GaussianSolution:
    """The posterior of a block that is no chain.

    Raises:
        DegenerateError: If an observation has no noise.
    """
    found = block.solve(arguments)
    assert isinstance(found, GaussianSolution)
    return found
