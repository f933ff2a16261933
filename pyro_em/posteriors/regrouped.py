"""A posterior laid out for another graph of the same model and data."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.gaussian_faces import regrouped_solutions
from pyro_em.posteriors.posterior import Posterior


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
    return replace(q, graph=graph, cells=cells, counts=counts, solved=solved)
