"""Medians: the location of a Laplace density is a weighted median of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import ParameterUpdate


def medians(
    update: ParameterUpdate,
    graph: FactorGraph,
    arguments: Sequence[Mapping[str, Tensor]],
    counts: Sequence[Tensor],
    value: Tensor,
) -> tuple[Tensor, list[int]]:
    """Weighted medians: a second pass over the data, one sort per element."""
    points: list[list[Tensor]] = [[] for _ in range(value.numel())]
    weights: list[list[Tensor]] = [[] for _ in range(value.numel())]
    for use in update.uses:
        group = graph.groups[use.group]
        index = use.selection.index
        w = counts[use.group].to(value.dtype)
        w = w.reshape(w.shape + (1,) * group.event_dims) / arguments[use.group]["scale"].detach()
        w = w if group.elements is None else w * group.elements
        shape = torch.broadcast_shapes(index.shape, w.shape, group.value.shape)
        full, x, w = index.expand(shape), group.value.expand(shape), w.expand(shape)
        for j in range(value.numel()):
            chosen = full == j
            points[j].append(x[chosen])
            weights[j].append(w[chosen])
    new, massless = value.reshape(-1).clone(), []
    interval = bounds(graph.parameters[update.name].constraint)
    for j in range(value.numel()):
        if not points[j]:
            continue
        x, w = torch.cat(points[j]), torch.cat(weights[j])
        if x.numel() == 0:
            continue
        if not float(w.sum()) > 0:
            massless.append(j)
            continue
        order = x.argsort()
        total = w[order].cumsum(0)
        middle = int(torch.searchsorted(total, total[-1] / 2))
        new[j] = update.uses[0].selection.inverse(x[order][min(middle, len(x) - 1)])
        if interval is not None:
            new[j] = new[j].clamp(*interval)  # the profile is concave
    return new.reshape(value.shape), massless
