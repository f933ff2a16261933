"""The posterior given the data of some steps only: exact for every model, one E-step for each.

A density of data that are left out is one. What integrates its own latents is solved again with their
weights at zero; the latents after the last step that is seen then integrate to one by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.data_steps import DataSteps
from pyro_em.posteriors.answers.gaussian_predictions import known_data
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.continuous.gaussian_steps import Solved
from pyro_em.posteriors.enumeration import contraction_of, e_step
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.scales.scaled import ScaledSolution


@dataclass(frozen=True, eq=False)
class SoFar:
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
) -> SoFar:
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
        if isinstance(solution, (ConjugateSolution, ScaledSolution)):
            own_tables[g] = _seen_table(steps, g, tables[g], last)
            continue
        assert isinstance(block, GaussianBlock)
        seen = {i: at <= last for (h, i), at in steps.of_rows.items() if h == g and i is not None}
        kept = {i: rows for i, rows in seen.items() if not bool(rows.all())}
        if kept:
            found = known_data(solution).seeing(kept)
            own_solved[g] = found
            # Evidence is known of solutions of numbers, which all that can leave out data are.
            own_tables[g] = block.table(found)  # type: ignore[arg-type]
    for (g, i), at in steps.of_rows.items():
        hidden = (at > last).nonzero().squeeze(-1)
        if i is None and len(hidden):
            own_tables[g] = tables[g].clone()
            own_tables[g][hidden.to(tables[g].device)] = 0.0
    own_cells = list(cells)
    if graph.latents:
        found_cells = e_step(graph, contraction_of(graph), own_tables).cells
        own_cells = []
        for group, table in zip(graph.groups, found_cells, strict=True):
            axes = tuple(range(1 + group.n_plates, table.dim()))
            own_cells.append(table / table.sum(axes, keepdim=True) if axes else table)
    return SoFar(own_tables, own_cells, own_solved)


def _seen_table(steps: DataSteps, g: int, table: Tensor, last: int) -> Tensor:
    """The evidence of each conjugate latent's data so far: all of them, or none.

    Raises:
        UsageError: If it has data at several steps, of which some come later.
    """
    own = [at.reshape(len(table), -1) for (h, _), at in steps.of_rows.items() if h == g]
    seen = torch.cat([at <= last for at in own], 1).to(table.device)
    all_of, any_of = seen.all(1), seen.any(1)
    if bool((any_of & ~all_of).any()):
        raise UsageError(
            message(
                "filtered",
                "a conjugate latent has data at several steps of the series.",
                "what is known of it at a step would need the sums of the data so far",
                ["ask for the posterior of a shorter series"],
            )
        )
    return table * all_of.reshape(-1, *(1,) * (table.dim() - 1))
