"""EM steps on sums whose parameters are plain values: an E-step is made once at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.encoding import DERIVED
from pyro_em.tracing.parameters import write_unconstrained
from pyro_em.updates.expectations.statistics import Expectation

Values = Mapping[str, Tensor]
E = TypeVar("E", bound=Expectation)


@dataclass(frozen=True, eq=False)
class AtValues(Generic[E]):
    """Parameter values, and the E-step there once it has been made.

    Attributes:
        values: Constrained values by name.
        expectation: The E-step.
    """

    values: Values
    expectation: list[E] = field(default_factory=list, metadata=DERIVED)


@dataclass(frozen=True, eq=False)
class ThetaByValues(Generic[E]):
    """The parameters of steps on sums, which are solved as those of any graph.

    Attributes:
        graph: That of an M-step; parameters of its own (`with_own_parameters`).
    """

    graph: FactorGraph

    def enter(self, values: Values) -> AtValues[E]:
        """Parameter values in the form of the E-step."""
        return AtValues(dict(values))

    def values(self, at: AtValues[E]) -> dict[str, Tensor]:
        """The parameters by name, in memory of their own."""
        return {name: value.clone() for name, value in at.values.items()}

    def log_prior(self, at: AtValues[E]) -> float:
        """No parameter has a prior."""
        return 0.0

    def write(self, at: AtValues[E]) -> None:
        """Put values into the parameters, from where an M-step goes on."""
        for name, parameter in self.graph.parameters.items():
            write_unconstrained(parameter, at.values[name])


def with_own_parameters(graph: FactorGraph) -> FactorGraph:
    """A graph whose parameters are in memory that steps may write."""
    own = {
        name: replace(p, unconstrained=p.unconstrained.detach().clone())
        for name, p in graph.parameters.items()
    }
    return replace(graph, parameters=own)


def no_densities(*_: object) -> dict[int, Tensor]:
    """Log densities for an M-step on sums, which hands over instead: it needs the rows."""
    raise Handover  # no parameter is updated by a gradient
