"""Parameters of EM steps whose M-step reads the sums of a model's groups over rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pyro_em.errors import DegenerateError, Handover
from pyro_em.posteriors.at_values import AtValues, ThetaByValues, no_densities
from pyro_em.reduction.reduction import Reduction, Whole
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.m_step import MStepState, m_step_over
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.model_sums import ModelSums
from pyro_em.updates.sums.newton_on_sums import AtEdge
from pyro_em.updates.sums.summable import Summable
from pyro_em.updates.update import ParameterUpdate


@dataclass(frozen=True, eq=False)
class Summed(Expectation):
    """The evidence with what an M-step reads.

    Attributes:
        model: The sums of the groups that it reads.
    """

    model: ModelSums | None = None


@dataclass(frozen=True, eq=False)
class SummedTheta(ThetaByValues[Summed]):
    """Parameters with their M-step from sums.

    Attributes:
        graph: That of an M-step.
        updates: What was decided per parameter.
        summable: Says which groups are read, and how they are added up.
    """

    updates: Mapping[str, ParameterUpdate]
    summable: Summable

    @property
    def expands(self) -> bool:
        """Whether an M-step expands the parameters of Gaussian latents."""
        return False

    @abstractmethod
    def e_step(self, at: AtValues[Summed]) -> Summed:
        """The evidence, and the sums of all rows.

        Raises:
            Handover: If the step through tables has to look.
        """

    def m_step(self, at: AtValues[Summed], expectation: Summed) -> tuple[AtValues[Summed], float]:
        """The maximiser, and the gain of the evidence in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        assert expectation.model is not None
        self.write(at)
        nothing = [torch.zeros(()) for _ in self.graph.groups]
        arguments = [dict(g.arguments) for g in self.graph.groups]
        data = DataSums(self.graph, {}, nothing, arguments, no_densities, at.values)
        model = expectation.model
        graph, first = self.summable.standing_for(model, data)
        rest = [first]

        def at_e_step() -> Reduction[DataSums]:
            # An M-step that begins anew has sums on which it has not moved.
            return Whole(rest.pop() if rest else self.summable.standing_for(model, data)[1])

        try:
            m_step_over(at_e_step, graph, first.updates, MStepState(), expand=self.expands)
        except (DegenerateError, AtEdge) as error:
            raise Handover from error
        after = self.enter(values_of(graph.parameters))
        return after, self.e_step(after).log_evidence - expectation.log_evidence
