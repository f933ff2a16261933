"""Closed forms that need the data themselves: a second pass over the data after the E-step.

With x_i the data that an element of a parameter explains and w_i their posterior weights, times what
the family's rule adds (the reciprocal scale of a Laplace density),

    θ ← argmax_a of the form at (x_i, w_i),   a weighted median where the form is −Σ_i w_i abs(x_i − a).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import ParameterUpdate


def from_data(
    update: ParameterUpdate,
    graph: FactorGraph,
    arguments: Sequence[Mapping[str, Tensor]],
    counts: Sequence[Tensor],
    value: Tensor,
) -> tuple[Tensor, list[int]]:
    """The maximiser for each element of a parameter.

    Args:
        update: A closed form whose form `needs_data`.
        graph: The factor graph.
        arguments: The current arguments per group.
        counts: Posterior weights per group.
        value: The parameter's current value.

    Returns:
        The new value, and the flat indices of elements that had no mass and were kept.
    """
    assert update.kind is not None
    form = update.kind.form
    points: list[list[Tensor]] = [[] for _ in range(value.numel())]
    weights: list[list[Tensor]] = [[] for _ in range(value.numel())]
    for use in update.uses:
        group = graph.groups[use.group]
        index = use.selection.index
        w = counts[use.group].to(value.dtype)
        w = w.reshape(w.shape + (1,) * group.event_dims)
        detached = {n: a.detach() for n, a in arguments[use.group].items()}
        x, w = use.rule.contribution({"event": group.value, "weight": w}, detached)
        w = w if group.elements is None else w * group.elements
        shape = torch.broadcast_shapes(index.shape, w.shape, x.shape)
        full, x, w = index.expand(shape), x.expand(shape), w.expand(shape)
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
        new[j] = update.uses[0].selection.inverse(form.of_data(x, w))
        if interval is not None:
            new[j] = new[j].clamp(*interval)  # the profile is concave
    return new.reshape(value.shape), massless
