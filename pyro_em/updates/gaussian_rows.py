"""The arguments of a site that reads Gaussian latents, as rows: cells of plates by events."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.graph.factors import Group


def event_shape(group: Group) -> torch.Size:
    """The shape of one event of a site, ``to_event`` included."""
    return group.value.shape[1 + group.n_plates :]


def rows_of(group: Group, t: Tensor, tail: int = 0) -> Tensor:
    """A tensor of a site's cells and events as rows, one where no plate changes it.

    Args:
        group: The site.
        t: # (1, *sizes or 1s, *event or 1s, *tail)
        tail: How many dimensions follow the event.

    Returns:
        # (rows or 1, D, *tail)
    """
    t, n, event = t[0], group.n_plates, event_shape(group)
    lead, rest = t.shape[:n], t.shape[n + len(event) :]
    assert len(rest) == tail
    if all(size == 1 for size in lead):
        t = t.reshape(1, *t.shape[n:])
    else:
        t = t.expand(*group.sizes, *t.shape[n:]).flatten(0, n - 1)
    return t.expand(len(t), *event, *rest).reshape(len(t), event.numel(), *rest)


def cells_of(group: Group, rows: Tensor, tail: int = 0) -> Tensor:
    """Rows as a tensor of the site's cells and events: the inverse of `rows_of`.

    Args:
        group: The site.
        rows: # (rows, D, *tail)
        tail: How many dimensions follow the event.
    """
    rest = rows.shape[rows.dim() - tail :] if tail else torch.Size()
    return rows.reshape(1, *group.sizes, *event_shape(group), *rest)


def tril_rows(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """The Cholesky factor of a multivariate normal's covariance. # (rows or 1, D, D)"""
    if "scale_tril" in arguments:
        return rows_of(group, arguments["scale_tril"], 1).to(torch.float64)
    if "covariance_matrix" in arguments:
        covariance = rows_of(group, arguments["covariance_matrix"], 1).to(torch.float64)
        return torch.linalg.cholesky(covariance)
    precision = rows_of(group, arguments["precision_matrix"], 1).to(torch.float64)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))


def is_matrix(group: Group) -> bool:
    """Whether the elements of an event are correlated given the mean."""
    assert group.family is not None
    return group.family.name == "MultivariateNormal"


def coefficient_rows(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """The coefficients (C, b) of all that the mean is made of. # (rows or 1, D, Q + 1)"""
    parts = [rows_of(group, arguments[a], 1) for a in group.lines if a != "loc"]
    parts.append(rows_of(group, arguments["loc"]).unsqueeze(-1))
    n = max(len(p) for p in parts)
    return torch.cat([p.expand(n, *p.shape[1:]).to(torch.float64) for p in parts], -1)
