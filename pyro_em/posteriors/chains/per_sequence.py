"""The sequences of a chain, each by itself: its log evidence, and sums weighted per sequence.

By forward and backward messages of all steps (`pyro_em.posteriors.messages.steps`); where these lose
what may matter, or a chain is of two steps only, nothing is found, and the contraction has to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.block import Values
from pyro_em.posteriors.contracted import onto
from pyro_em.posteriors.messages.product_steps import product_steps
from pyro_em.posteriors.messages.steps import StepCells, step_cells, steps_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation, Key, group_sums


@dataclass(frozen=True, eq=False)
class PerSequence:
    """The sequences of a chain; `PerSequence.of` makes one.

    Attributes:
        graph: The groups that count.
        numbers: Their numbers in the whole graph.
    """

    graph: FactorGraph
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, graph: FactorGraph) -> Self | None:
        """The sequences of a collapsed graph; None where it is no chain that messages serve."""
        # Priors of point estimates are no part of the log evidence.
        numbers = [g for g, group in enumerate(graph.groups) if group.role is not Role.POINT]
        counted = replace(graph, groups=tuple(graph.groups[g] for g in numbers))
        is_chain = steps_of(counted) is not None or product_steps(counted) is not None
        return cls(counted, tuple(numbers)) if is_chain else None

    @cached_property
    def dims(self) -> tuple[str, ...]:
        """The plates of the sequences in which everything lies."""
        plates = set(next(iter(self.graph.latents.values())).plates)
        for group in self.graph.groups:
            for dims in group.dims:
                plates &= set(dims)
        return tuple(p for p in self.graph.structure.plates if p in plates)

    def table(self, values: Values) -> Tensor | None:
        """The log evidence per cell of ``dims``, in nats; None where messages cannot tell."""
        found = self._cells(values)
        return None if found is None else self._evidence(found)

    def expect(self, values: Values, weights: Tensor) -> Expectation | None:
        """Evidence and sums, each cell of ``table`` counted as often as it weighs.

        Args:
            values: Constrained parameter values by name.
            weights: One number per cell.

        Returns:
            The sums; None where messages cannot tell.
        """
        found = self._cells(values)
        if found is None:
            return None
        sums: dict[Key, Statistics] = {}
        references = {}
        for g, group, cells in zip(self.numbers, self.graph.groups, found.cells, strict=True):
            if group.family is None:
                continue
            arguments = {n: a.detach() for n, a in group.evaluate_arguments(values).items()}
            sums[g] = group_sums(group, cells * self._over(weights, group), arguments)
            references[g] = arguments
        table = self._evidence(found)
        evidence = float(torch.where(weights == 0, 0.0, table * weights).sum())
        return Expectation(evidence, sums, references)

    def _cells(self, values: Values) -> StepCells | None:
        tables = [g.log_density_at(values).to(torch.float64) for g in self.graph.groups]
        return step_cells(self.graph, tables)

    def _evidence(self, found: StepCells) -> Tensor:
        parts = [onto(term, dims, self.dims, self.graph) for dims, term in found.terms]
        return torch.stack(parts).sum(0)

    def _over(self, weights: Tensor, group: Group) -> Tensor:
        """Weights laid out over the cells of a group. # (*sizes or 1s)"""
        plates = group.dims[0][: group.n_plates]
        order = [self.dims.index(p) for p in plates if p in self.dims]
        sizes = [self.graph.dim_size(p) if p in self.dims else 1 for p in plates]
        return weights.permute(order).reshape([*sizes, *(1,) * (len(group.sizes) - len(plates))])
