"""The observed information of a static model: from its factor graph alone, wherever that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.fitting.results.standard_errors import StandardErrors, standard_errors
from pyro_em.graph.factors import FactorGraph
from pyro_em.portable import Portable
from pyro_em.posteriors.contraction import contract, evidence
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import scales_of
from pyro_em.tracing.dependences import Dependences


def loadings_of(graph: FactorGraph) -> frozenset[str]:
    """Parameters that multiply Gaussian latents."""
    return frozenset(
        name
        for group in graph.groups
        for site in (group.nested.groups if group.nested is not None else ())
        for argument in site.lines
        if argument != "loc"
        for name in site.bindings[argument].params
    )


@dataclass(frozen=True, eq=False)
class StaticInformation(Portable):
    """Gives standard errors without the model: what a pickled copy of a result keeps.

    Attributes:
        graph: A factor graph whose densities can be recomputed from the parameters.
        contraction: Its elimination order.
        unconstrained: The parameters of the fit.
        fixed: Names of those that are not free.
        dependences: What the graph was read from; None in a copy, which shares no memory with it.
    """

    graph: FactorGraph
    contraction: ContractionPlan
    unconstrained: Mapping[str, Tensor]
    fixed: frozenset[str]
    dependences: Dependences | None

    def is_changed(self) -> bool:
        """Whether something that the graph holds of the data was written since the fit."""
        return self.dependences is not None and self.dependences.is_written()

    def _travelling(self) -> dict[str, Any]:
        return {**vars(self), "dependences": None}

    def _staying(self) -> dict[str, Any]:
        return {**vars(self), "dependences": None}

    def __call__(self) -> StandardErrors:
        """Standard errors at the parameters of the fit."""
        fitted = {n: self.unconstrained[n].detach().clone() for n in self.graph.parameters}
        parameters = {
            n: replace(p, unconstrained=fitted[n], leaf=fitted[n].clone())
            for n, p in self.graph.parameters.items()
        }

        def evidence_of(moved: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
            values = {**{n: p.value() for n, p in parameters.items() if n not in moved}, **moved}
            tables = [g.log_density_at(values).to(torch.float64) for g in self.graph.groups]
            flat = [part for table in tables for part in table.unbind(0)]
            total = evidence(contract(self.contraction, flat, scales=scales_of(self.graph)))
            return flat, total

        return standard_errors(
            [p for n, p in parameters.items() if n not in self.fixed],
            evidence_of,
            loadings_of(self.graph),
        )
