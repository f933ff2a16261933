"""A mixture row by row: its log evidence per row, and sums in which rows weigh differently.

    table_n = s_n log Σ_k exp ℓ_nk,     S = Σ_n w_n s_n Σ_k r_nk T(x_n)

with the responsibilities r_nk, what a row counts by its scale, s_n, and what its cell weighs, w_n. This
is what a mixture inside another block is asked for; all rows are held at once, by their own tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.block import Values
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.mixtures.rows import RowShape
from pyro_em.updates.expectations.statistics import Expectation, Key, group_sums


@dataclass(frozen=True, eq=False)
class PerRow:
    """The rows of a mixture, none of them merged with others.

    Attributes:
        graph: The collapsed graph.
        shape: Its groups, by what they read.
        counts: What each row counts by its scale. # (N,)
    """

    graph: FactorGraph
    shape: RowShape
    counts: Tensor

    @property
    def dims(self) -> tuple[str, ...]:
        """The plate of the rows, where nothing lies outside it."""
        free = (dims for g in self.shape.free for dims in self.graph.groups[g].dims)
        return (self.shape.plate,) if all(self.shape.plate in dims for dims in free) else ()

    def table(self, values: Values) -> Tensor:
        """The log evidence per row in nats, or its sum where ``dims`` is empty. # (N,) or ()"""
        total = log_sum_exp(self._joint(values)) * self.counts
        total = total if self.dims else total.sum()
        for g in self.shape.free:
            group = self.graph.groups[g]
            for table, dims in zip(group.log_density_at(values), group.dims, strict=True):
                axes = [i for i, d in enumerate(dims) if d not in self.dims]
                total = total + (table.double().sum(axes) if axes else table.double())
        return total

    def expect(self, values: Values, weights: Tensor) -> Expectation:
        """Evidence and sums, each cell of ``table`` counted as often as it weighs.

        Args:
            values: Constrained parameter values by name.
            weights: One number per cell. # (N,) or ()
        """
        joint = self._joint(values)
        log_p = log_sum_exp(joint)
        possible = torch.where(torch.isfinite(log_p), log_p, 0.0)
        responsibilities = (joint - possible.unsqueeze(-1)).exp()
        responsibilities = responsibilities * (self.counts * weights).unsqueeze(-1)
        sums: dict[Key, Statistics] = {}
        references = {}
        for g in (*self.shape.rowwise, *self.shape.tables, *self.shape.free):
            group = self.graph.groups[g]
            if g in self.shape.free:
                cells = self._known(group, weights)
            else:
                cells = responsibilities.expand(len(group.members), *responsibilities.shape)
            arguments = {n: a.detach() for n, a in group.evaluate_arguments(values).items()}
            sums[g] = group_sums(group, cells, arguments)
            references[g] = arguments
        table = self.table(values)
        evidence = float(torch.where(weights == 0, 0.0, table * weights).sum())
        return Expectation(evidence, sums, references)

    def _joint(self, values: Values) -> Tensor:
        """Log densities of a row's data with each value of its latent, summed. # (N, K)"""
        groups = [self.graph.groups[g] for g in (*self.shape.rowwise, *self.shape.tables)]
        parts = [group.log_density_at(values).to(torch.float64).sum(0) for group in groups]
        return torch.stack(parts).sum(0)

    def _known(self, group: Group, weights: Tensor) -> Tensor:
        """The weights of a group that reads no latent. # (members, *sizes)"""
        cells = [
            weights.reshape([-1 if d in self.dims else 1 for d in dims]).expand(group.sizes)
            for dims in group.dims
        ]
        return torch.stack(cells)
