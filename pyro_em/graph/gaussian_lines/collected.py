"""Means that read many latents of one series, one in each row: ``torch.stack`` of a loop's latents.

    y[t] ~ N(C h_t + b, …)   in one plate of all steps

The latents of a series are read as one with the elements of all: a few vectors tell which element of
which latent each row reads, in place of a few for each latent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.gaussian_lines.jacobians import Coefficients, SiteJacobian, SitePlace, one_each
from pyro_em.tracing.without_sympy import pull_back_all

_FEWEST = 8  # latents of a series that are looked at together


def collected(
    place: SitePlace,
    loc: Tensor,
    latents: Sequence[str],
    values: Mapping[str, Tensor],
    sites: Mapping[str, Mapping[str, Any]],
) -> dict[str, Coefficients]:
    """How latents enter a mean, of those whose series is read by one element in each row.

    Coefficients of the latents of one series are one tensor, over all rows.

    Args:
        place: Where the cells of the site are.
        loc: Its mean.
        latents: What it reads.
        values: Values of the latents.
        sites: As the run traced them.
    """
    series: dict[tuple[str, torch.Size, int], list[str]] = {}
    if len(latents) < _FEWEST:
        return {}
    for name in latents:
        kind = re.sub(r"\d+", "#", name), values[name].shape, sites[name]["fn"].event_dim
        series.setdefault(kind, []).append(name)
    out = {}
    for (_, _, event_dim), own in series.items():
        if len(own) < _FEWEST:
            continue
        jacobian = jacobian_of_all(place, loc, [values[n] for n in own], event_dim)
        found = one_each(jacobian)
        if found is None:
            continue
        each = jacobian.count // len(own)
        which = torch.div(found.elements, each, rounding_mode="floor")
        for k, name in enumerate(own):
            elements = torch.where(which == k, found.elements - k * each, -1)
            out[name] = replace(found, elements=elements)
    return out


def jacobian_of_all(
    place: SitePlace, loc: Tensor, leaves: Sequence[Tensor], event_dim: int
) -> SiteJacobian:
    """∂loc/∂h in latents of one shape, as one with the elements of all."""
    first = leaves[0]
    batch = first.dim() - event_dim
    count, q = first.shape[:batch].numel(), first.shape[batch:].numel()
    v = torch.zeros_like(loc, requires_grad=True)
    found = pull_back_all([loc], [*leaves], [v], create_graph=True, allow_unused=True)
    known = [(k, g) for k, g in enumerate(found) if g is not None and g.requires_grad]

    def forward(t: Tensor) -> Tensor:
        parts = t.reshape(len(leaves), *first.shape)
        (out,) = pull_back_all(
            [g for _, g in known],
            [v],
            [parts[k].to(g) for k, g in known],
            create_graph=True,
            allow_unused=True,
        )
        return torch.zeros_like(v) if out is None else out

    leaf = torch.cat([x.detach().reshape(count, q) for x in leaves])
    return SiteJacobian(place, loc, leaf, forward, len(leaf), q)
