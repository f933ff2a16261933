"""Normal priors on the coefficients of rows: quadratic, and so part of every M-step on sums.

    log p(β) = log p(β₀) + gᵀ (β − β₀) − ½ (β − β₀)ᵀ Λ (β − β₀),     g = Λ (μ − β₀),

at any point β₀: where the parameters were when the rows were laid out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role
from pyro_em.updates.regressions.coefficient_priors import is_quadratic, normal_priors
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.update import ParameterUpdate


@dataclass(frozen=True, eq=False)
class Ridge:
    """The log prior of some coefficients.

    Attributes:
        names: The parameters.
        at: β₀. # (C,)
        value: log p(β₀) in nats. # ()
        pull: g. # (C,)
        precision: Λ. # (C, C)
    """

    names: tuple[str, ...]
    at: Tensor
    value: Tensor
    pull: Tensor
    precision: Tensor

    @classmethod
    def of(
        cls,
        block: Sequence[str],
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        values: Mapping[str, Tensor],
    ) -> Ridge | None:
        """That of parameters whose priors `may_be_ridge`; None where they have none."""
        at = torch.cat([values[n].detach().reshape(-1).to(torch.float64) for n in block])
        precision, pull = normal_priors(block, graph, values, updates, at)
        if precision is None:
            return None
        groups = {p.group for n in block for p in updates[n].priors}
        value = at.new_zeros(())
        for g in groups:
            group = graph.groups[g]
            log_p = group.log_density(group.arguments, group.evaluate_value(values))
            value = value + log_p.detach().to(torch.float64).sum()
        return cls(tuple(block), at, value, pull, precision)

    def curved(self, beta: Tensor) -> Curved:
        """log p with its derivatives."""
        away = beta - self.at
        back = self.precision @ away
        value = self.value + torch.dot(self.pull, away) - 0.5 * torch.dot(back, away)
        return Curved(value, self.pull - back, self.precision)


def may_be_ridge(graph: FactorGraph, updates: Mapping[str, ParameterUpdate], name: str) -> bool:
    """Whether all priors of a parameter are Normal with known numbers; also where it has none."""
    return all(is_quadratic(graph, p) and p.is_constant for p in updates[name].priors)


def are_read_elsewhere(graph: FactorGraph, names: Collection[str], g: int) -> bool:
    """Whether a group beside a given one, or beside priors, reads any of some parameters."""
    own = set(names)
    return any(
        own & set(other.params)
        for h, other in enumerate(graph.groups)
        if h != g and other.role is not Role.POINT
    )


class WithPrior:
    """Rows that take part in the priors of their own parameters."""

    @property
    def in_prior(self) -> tuple[str, ...]:
        """The parameters whose priors the rows know."""
        return ()

    def log_prior(self, components: Any) -> Tensor | float:
        """Log density of these parameters, in nats."""
        return 0.0


@dataclass(eq=False)
class WithRidge(WithPrior):
    """What rows share whose coefficients may have a Normal prior.

    Attributes:
        ridge: The prior; None where there is none.
    """

    ridge: Ridge | None = field(default=None, kw_only=True)

    @property
    def in_prior(self) -> tuple[str, ...]:
        """The parameters whose priors the rows know."""
        return () if self.ridge is None else self.ridge.names

    def log_prior(self, fit: Any) -> Tensor | float:
        """Log density of the coefficients, in nats."""
        return 0.0 if self.ridge is None else self.ridge.curved(fit.beta).value

    def with_prior(self, found: Curved, beta: Tensor) -> Curved:
        """A function of the coefficients with their log prior."""
        return found if self.ridge is None else found + self.ridge.curved(beta)
