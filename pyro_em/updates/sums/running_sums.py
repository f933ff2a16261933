"""The M-step from sums that are kept in place of rows.

What it asks of the data, evidence and derivatives, are functions of sums whose number does not grow
with the rows,

    S_g = Σ_rows E_q[T_g],    E_q[log p] = Σ_g ℓ_g(S_g, θ);

groups outside the plate of rows are no sums over rows: they are read as they are, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.closed_forms.closed_form import Blend, natural_values, solver_of
from pyro_em.updates.sums.data_sums import DataSums, Evaluate
from pyro_em.updates.sums.model_sums import SummedDensity
from pyro_em.updates.update import ParameterUpdate


class RunningSums(DataSums):
    """What an M-step asks, answered from sums.

    Args:
        graph: Few rows stand for all in its groups.
        updates: What was decided per parameter, for these groups.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        evaluate: From constrained values and group numbers to those groups' log densities.
        values: The parameters at the E-step.
        masses: Total expected counts per group.
        closed_forms: Numerators and denominators of closed forms, where these are kept.
    """

    def __init__(
        self,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        counts: Sequence[Tensor],
        arguments: Sequence[Mapping[str, Tensor]],
        evaluate: Evaluate,
        values: Mapping[str, Tensor],
        masses: Sequence[float],
        closed_forms: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(graph, updates, counts, arguments, evaluate, values)
        self._masses, self._closed_forms = list(masses), closed_forms

    def masses(self) -> list[float]:
        """See `DataSums.masses`."""
        return self._masses

    def solved(self, name: str, blend: Blend | None = None) -> tuple[Tensor, list[int]]:
        """See `DataSums.solved`."""
        if name not in self._closed_forms:
            return super().solved(name, blend)
        value = self.values[name]
        solver = solver_of(self.updates[name], self.graph, value)
        return solver.maximiser(*self._closed_forms[name], value)

    def refuse_edges(self, groups: Sequence[int]) -> bool:
        """See `DataSums.refuse_edges`: data of sums are not at hand any more."""
        return super().refuse_edges([g for g in groups if self.graph.groups[g].belief is None])

    def expected_by(self, values: Mapping[str, Tensor], groups: Sequence[int]) -> float:
        """E_q[log p] of some groups, and of closed forms that are kept, in nats."""
        total = float(self.expected_log_joint(values, groups).detach()) if groups else 0.0
        for name, (n, d) in self._closed_forms.items():
            update = self.updates[name]
            assert update.kind is not None
            rows = values[name].detach().to(torch.float64).reshape(len(n), *n.shape[1:])
            total += float(update.kind.form.expected(n, d, natural_values(update, rows)))
        return total

    def _taken(self, groups: Iterable[int]) -> dict[int, Statistics]:
        groups = list(groups)
        for g in self.stale.intersection(groups):
            belief = self.graph.groups[g].belief
            if isinstance(belief, SummedDensity):
                self._statistics[g] = belief.sums.named()
                self.stale.discard(g)
        return super()._taken(groups)
