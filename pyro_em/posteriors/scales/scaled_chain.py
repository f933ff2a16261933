"""A chain of Gaussian latents all of whose variances are multiples of one number, a conjugate latent.

With g the precision that all sites share, one pass of the Kalman filter and smoother at g = 1 gives the
posterior mean m of the states, which does not depend on g, and the sum Q of all squares there, noises
of the states included:

    log p(y | g) = ½ n log g − ½ Q g + const,     n observed numbers,

so that for g the chain is one more child. A second pass, where g is at its posterior mean, gives the
constant and the moments of an M-step (`pyro_em.posteriors.scales.scaled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import together
from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_cells import ElementsRead
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.gaussians.integrated import Integrated, Solution
from pyro_em.posteriors.scales.scaled import ScaledBlock, ScaledSolution
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.posteriors.states.state_solution import StateSolution
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.conjugate_beliefs import with_factor

Arguments = Mapping[str, Tensor]

# The power of the precision that each spread is.
_POWERS = {
    "scale": -0.5,
    "scale_tril": -0.5,
    "covariance_matrix": -1.0,
    "precision_matrix": 1.0,
}


@dataclass(frozen=True, eq=False)
class ScaledChain(ScaledBlock):
    """See the module's text. The conjugate block has no site of the chain."""

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return "Kalman filter and smoother with a conjugate scale"

    def solve(self, arguments: Arguments) -> ScaledSolution:
        """See `ScaledBlock.solve`."""
        unit = self.gaussian.solve(arguments)
        assert isinstance(unit, StateSolution)
        given = self._added(unit)
        scale = self.conjugate.solve(arguments, given)
        at = self.gaussian.solve(self._at_mean(scale, arguments)[0])
        t = self.conjugate.kernel.at_mean(scale.t.detach())
        table = self.gaussian.table(at) - (given * t).sum(-1).reshape(1)
        return ScaledSolution(scale, self._with(scale, at), table)

    def _added(self, unit: StateSolution) -> Tensor:
        """Δχ of the chain. # (1, 1, 2)"""
        squares, count = unit.numbers.constant.new_zeros(()), unit.numbers.constant.new_zeros(())
        for i, group in enumerate(self.gaussian.groups):
            each = unit.whitened(i).square()
            if group.role is not Role.GAUSSIAN:  # the posterior of a latent has as many numbers
                weight = unit.numbers.stacks[i].weight
                if weight is None:
                    count = count + each.numel()
                else:
                    each = weight * each
                    count = count + weight.expand(each.shape[1:]).sum()
            squares = squares + each.sum()
        return together(count / 2, squares / 2).reshape(1, 1, 2)

    def given_scale(self, scale: ConjugateSolution, arguments: Arguments) -> Integrated:
        """See `ScaledBlock.given_scale`."""
        return self._with(scale, self.gaussian.solve(self._at_mean(scale, arguments)[0]))

    def _with(self, scale: ConjugateSolution, at: Solution) -> ScaledGaussian:
        one = ElementsRead.of(torch.zeros(1, 1, dtype=torch.long, device=scale.t.device), 1, 1)
        readings = dict.fromkeys(set(self.gaussian.latents.values()), one)
        return ScaledGaussian(at, scale, readings, self._count)

    def _at_mean(
        self, scale: ConjugateSolution, arguments: Arguments
    ) -> tuple[dict[str, Tensor], tuple[Group, ...]]:
        """See `ScaledBlock._at_mean`."""
        mean, own, groups = -scale.t.detach()[0, 0, 1], dict(arguments), []
        for i, group in enumerate(self.gaussian.groups):
            name = spread_of(group)
            factor = mean ** _POWERS[name]
            at = self.gaussian.of_site(i, arguments)
            at[name] = at[name] * factor.to(at[name])
            own |= {f"{a} of '{group.members[0]}'": t for a, t in at.items()}
            binding = with_factor(group.bindings[name], factor)
            bindings = group.bindings if binding is None else {**group.bindings, name: binding}
            groups.append(replace(group, arguments=at, bindings=bindings))
        return own, tuple(groups)

    def _spread_of(self, i: int) -> str:
        return spread_of(self.gaussian.groups[i])

    def _constant(self, i: int, scale: ConjugateSolution) -> Tensor:
        """See `ScaledBlock._constant`: once for each number that counts. # (1, rows)"""
        group = self.gaussian.groups[i]
        off = (scale.t - self.conjugate.kernel.at_mean(scale.t))[0, 0, 0] * self._count
        site = self.gaussian.layout.sites[i]
        each = off.expand(site.rows, site.width)
        if group.role is not Role.GAUSSIAN and group.elements is not None:
            seen, lead = group.elements, 1 + len(group.sizes)
            seen = seen.expand(len(group.members), *group.sizes, *seen.shape[lead:])
            each = each * seen.reshape(site.rows, -1).to(each)
        return each.sum(-1).unsqueeze(0)


def spread_of(group: Group) -> str:
    """The name of the argument that is a site's spread."""
    return next(a for a in _POWERS if a in group.arguments)


def may_have_scale(chain: GaussianChain) -> bool:
    """Whether a chain may share a conjugate scale: nothing discrete reaches it, nothing is weighed."""
    return not chain.scope and not any(g.by_steps or not g.is_unscaled for g in chain.groups)


def scaled_chain(chain: GaussianChain, scale: ConjugateBlock) -> ScaledChain:
    """A chain with its scale, and with what updates have to know: a factor, or that a gradient serves.

    Args:
        chain: The chain, the scale at its unit.
        scale: The block of the scale, without the sites of the chain.
    """
    groups = []
    for group in chain.groups:
        name = spread_of(group)
        one = torch.ones((), dtype=group.arguments[name].dtype, device=group.value.device)
        scaled = with_factor(group.bindings[name], one)
        if scaled is None:
            groups.append(replace(group, raw_params=group.params))
        else:
            groups.append(replace(group, bindings={**group.bindings, name: scaled}))
    return ScaledChain(replace(chain, groups=tuple(groups)).over((), ()), scale)
