"""The posterior given the data of some steps only: exact for every model, one E-step for each.

A density of data that are left out is one. What integrates its own latents is solved again with their
weights at zero; the latents after the last step that is seen then integrate to one by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.data_steps import DataSteps
from pyro_em.posteriors.enumeration import contraction_of, e_step
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.posteriors.gaussian_steps import Solved
from pyro_em.posteriors.linear_gaussian import Integrated


@runtime_checkable
class LeavesOut(Protocol):
    """A solution that can be had for a part of its data."""

    def seeing(self, kept: Mapping[int, Tensor]) -> Integrated:
        """The posterior given some of the data.

        Args:
            kept: By the number of an observed site which of its rows are seen; all of a site that is
                not named. # (rows,) each
        """
        ...


@dataclass(frozen=True, eq=False)
class Part:
    """What a posterior is made of, given a part of the data.

    Attributes:
        tables: Log densities per group. # (members, *sizes)
        cells: Per group the probability of every cell. # (members, *sizes)
        solved: The posterior of the latents that groups integrate.
    """

    tables: list[Tensor]
    cells: list[Tensor]
    solved: Solved


@torch.no_grad()
def given_steps(
    graph: FactorGraph,
    tables: Sequence[Tensor],
    cells: Sequence[Tensor],
    solved: Solved,
    steps: DataSteps,
    last: int,
) -> Part:
    """The posterior given the data up to and including a step.

    Args:
        graph: The factor graph.
        tables: Log densities per group, of all data. # (members, *sizes)
        cells: The posterior of their cells. # (members, *sizes)
        solved: The posterior of the latents that groups integrate.
        steps: When data come.
        last: The last step that is seen; −1 for the data of no step alone.
    """
    own_tables, own_solved = list(tables), dict(solved)
    for g, solution in solved.items():
        block = graph.groups[g].nested
        assert isinstance(block, GaussianBlock)
        kept = {i: at <= last for (h, i), at in steps.of_site.items() if h == g}
        hidden = {i: rows for i, rows in kept.items() if not bool(rows.all())}
        if hidden:
            found = _leaving_out(solution).seeing(hidden)
            own_solved[g] = found
            # Evidence is known of solutions of numbers, which all that can leave out data are.
            own_tables[g] = block.table(found)  # type: ignore[arg-type]
    for (g, i), at in steps.of_site.items():
        if g not in solved and int(at) > last:
            if own_tables[g] is tables[g]:
                own_tables[g] = tables[g].clone()
            own_tables[g][i] = 0.0
    own_cells = list(cells)
    if graph.latents:
        found_cells = e_step(graph, contraction_of(graph), own_tables).cells
        own_cells = []
        for group, table in zip(graph.groups, found_cells, strict=True):
            axes = tuple(range(1 + group.n_plates, table.dim()))
            own_cells.append(table / table.sum(axes, keepdim=True) if axes else table)
    return Part(own_tables, own_cells, own_solved)


def _leaving_out(solution: Integrated) -> LeavesOut:
    if isinstance(solution, LeavesOut):
        return solution
    raise UsageError(
        message(
            "filtered",
            "these are moments that were given, of which no data are known.",
            "what was known at each step follows from the data up to it",
            ["ask the posterior of the data: em.posterior(x).filtered('h_*')"],
        )
    )
