"""A posterior laid out for another graph of the same model and data."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.continuous.gaussian_steps import Solved
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.scales.scaled import ScaledSolution
from pyro_em.tracing.sites import INTEGRATED


def regrouped(q: Posterior, graph: FactorGraph) -> Posterior | None:
    """A posterior laid out for another graph of the same model and data; None if it is not."""
    solved = regrouped_solutions(q.graph, q.solved, graph)
    if solved is None:
        return None
    by_site = {
        name: (g.dims[i], g.sizes, q.cells[k][i], q.counts[k][i])
        for k, g in enumerate(q.graph.groups)
        for i, name in enumerate(g.members)
    }
    names = [name for g in graph.groups for name in g.members]
    if set(names) != set(by_site):
        return None
    cells, counts = [], []
    for group in graph.groups:
        for i, name in enumerate(group.members):
            dims, sizes, _, _ = by_site[name]
            if dims != group.dims[i] or sizes != group.sizes:
                return None
        cells.append(torch.stack([by_site[name][2] for name in group.members]))
        counts.append(torch.stack([by_site[name][3] for name in group.members]))
    return replace(q, graph=graph, cells=cells, counts=counts, solved=solved, parameters=None)


def regrouped_solutions(graph: FactorGraph, solved: Solved, other: FactorGraph) -> Solved | None:
    """The solutions of a graph by the numbers of the groups of another; None where these differ.

    Args:
        graph: That of the solutions.
        solved: By its groups.
        other: One of the same model.
    """
    by_latents = {_latents(graph.groups[g]): s for g, s in solved.items()}
    out: dict[int, Integrated | ConjugateSolution | ScaledSolution] = {}
    for g, group in enumerate(other.groups):
        if group.nested is not None:
            solution = by_latents.pop(_latents(group), None)
            if solution is None:
                return None
            out[g] = solution
    return None if by_latents else out


def _latents(group: Group) -> tuple[str, ...]:
    """The latents that a group integrates."""
    assert group.nested is not None
    return tuple(n for g in group.nested.groups if g.role in INTEGRATED for n in g.members)
