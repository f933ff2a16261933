"""The arguments of a site that reads Gaussian latents as rows, one batch for each discrete cell.

A row is a cell of the site's plates, of each member of its group in turn; the states of the discrete
latents in its scope come first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import Group


def event_shape(group: Group) -> torch.Size:
    """The shape of one event of a site, ``to_event`` included."""
    return group.value.shape[1 + len(group.sizes) :]


def rows_of(group: Group, t: Tensor, tail: int = 0) -> Tensor:
    """A tensor of a site's cells and events as rows, one where no plate changes it.

    Args:
        group: The site.
        t: # (members or 1, *sizes or 1s, *event or 1s, *tail)
        tail: How many dimensions follow the event.

    Returns:
        # (cells or 1, rows or 1, D, *tail)
    """
    event, n = event_shape(group), group.n_plates
    rest = t.shape[t.dim() - tail :] if tail else torch.Size()
    rows = _flat(once(t), 0, (len(group.members), *group.sizes[:n]))
    both = _flat(rows, 1, group.sizes[n:])
    return (
        both.transpose(0, 1)
        .expand(both.shape[1], len(both), *event, *rest)
        .reshape(both.shape[1], len(both), event.numel(), *rest)
    )


def apart_rows(group: Group, t: Tensor, tail: int = 0, *, own_event: bool = False) -> Tensor:
    """As `rows_of`, with the members of the group apart from their rows.

    Args:
        group: The site.
        t: # (members or 1, *sizes or 1s, *event or 1s, *tail)
        tail: How many dimensions follow the event.
        own_event: Whether the event stays as small as it is held.

    Returns:
        # (cells or 1, members or 1, rows or 1, D, *tail)
    """
    event, n = event_shape(group), group.n_plates
    t = once(t)
    rest = t.shape[t.dim() - tail :] if tail else torch.Size()
    plates = group.sizes[:n]
    if group.by_steps:
        t, plates = once(t[0]), plates[1:]
    rows = _flat(_flat(t, 1, plates), 2, group.sizes[n:]).movedim(2, 0)
    own = rows.shape[3 : rows.dim() - tail]
    if own_event and own.numel() == 1:
        return rows.reshape(*rows.shape[:3], 1, *rest)
    return rows.expand(*rows.shape[:3], *event, *rest).reshape(
        *rows.shape[:3], event.numel(), *rest
    )


def once(t: Tensor) -> Tensor:
    """What is the same for all members of a group, held for one. # (members or 1, …)"""
    return t[:1] if t.stride(0) == 0 else t


def _flat(t: Tensor, begin: int, sizes: tuple[int, ...]) -> Tensor:
    """Some dimensions as one: of size one where none of them is larger."""
    end = begin + len(sizes)
    lead, own, rest = t.shape[:begin], t.shape[begin:end], t.shape[end:]
    if all(size == 1 for size in own):
        return t.reshape(*lead, 1, *rest)
    return t.expand(*lead, *sizes, *rest).reshape(*lead, torch.Size(sizes).numel(), *rest)


def cells_of(group: Group, rows: Tensor, tail: int = 0) -> Tensor:
    """Rows as a tensor of the site's cells and events: the inverse of `rows_of`.

    Args:
        group: The site.
        rows: # (cells, rows, D, *tail)
        tail: How many dimensions follow the event.

    Returns:
        # (members, *sizes, *event, *tail)
    """
    rest = rows.shape[rows.dim() - tail :] if tail else torch.Size()
    lead = len(group.members), *group.sizes
    return rows.transpose(0, 1).reshape(*lead, *event_shape(group), *rest)


def weights_of(group: Group, counts: Tensor | None = None) -> Tensor:
    """How much each row, or each of its entries, counts.

    Args:
        group: The site.
        counts: Posterior probabilities of its cells. # (members, *sizes)

    Returns:
        # (cells or 1, rows), or (cells or 1, rows, D) where elements of events are masked
    """
    weights = group.weights().detach().to(torch.float64)
    n = group.n_plates
    lead, own = weights.shape[: 1 + len(group.sizes)], weights.shape[1 + len(group.sizes) :]
    if counts is not None:
        weights = weights * counts.reshape(counts.shape + (1,) * len(own))
        lead = weights.shape[: 1 + len(group.sizes)]
    plates = len(group.members), *group.sizes[:n]
    flat = once(weights.reshape(*lead, *own))
    flat = _flat(_flat(flat, 0, plates), 1, group.sizes[n:]).transpose(0, 1)
    rows = torch.Size(plates).numel()
    flat = flat.expand(len(flat), rows, *flat.shape[2:])
    if group.elements is None:
        return flat
    event = event_shape(group)
    return flat.expand(len(flat), rows, *event).reshape(len(flat), rows, event.numel())


def tril_rows(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """The Cholesky factor of a multivariate normal's covariance. # (cells or 1, rows or 1, D, D)"""
    return _tril({a: rows_of(group, t, 1) for a, t in arguments.items() if a in _MATRICES})


def tril_factors(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """As `tril_rows`, with the members apart. # (cells or 1, members or 1, rows or 1, D, D)"""
    return _tril({a: apart_rows(group, t, 1) for a, t in arguments.items() if a in _MATRICES})


_MATRICES = ("scale_tril", "covariance_matrix", "precision_matrix")


def _tril(spreads: Mapping[str, Tensor]) -> Tensor:
    if "scale_tril" in spreads:
        return spreads["scale_tril"].to(torch.float64)
    if "covariance_matrix" in spreads:
        return torch.linalg.cholesky(spreads["covariance_matrix"].to(torch.float64))
    precision = spreads["precision_matrix"].to(torch.float64)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))


def is_matrix(group: Group) -> bool:
    """Whether the elements of an event are correlated given the mean."""
    assert group.family is not None
    return group.family.name in ("MultivariateNormal", "IncompleteMultivariateNormal")


def coefficient_rows(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """The coefficients (C, b) of all that the mean is made of. # (cells or 1, rows or 1, D, Q + 1)"""
    parts = [rows_of(group, arguments[a], 1) for a in group.lines if a != "loc"]
    parts.append(rows_of(group, arguments["loc"]).unsqueeze(-1))
    shape = torch.broadcast_shapes(*(p.shape[:2] for p in parts))
    return torch.cat([p.expand(*shape, *p.shape[2:]).to(torch.float64) for p in parts], -1)


def design_of(group: Group, binding: Binding, name: str, value: Tensor, tail: int) -> Tensor:
    """∂a/∂θ of one argument. # (cells or 1, rows or 1, D, *tail, θ.numel())"""
    if binding.jacobians is not None and name in binding.jacobians:
        return rows_of(group, binding.jacobians[name].dense, tail + 1).to(torch.float64)
    for part in binding.selections:
        if part.param == name:
            columns = torch.arange(value.numel(), device=part.index.device)
            chosen = (once(part.index).unsqueeze(-1) == columns).to(torch.float64)
            if part.factor is not None:
                chosen = chosen * once(part.factor).unsqueeze(-1)
            return rows_of(group, chosen, tail + 1)
    event = event_shape(group).numel()
    rest = binding.constant.shape[binding.constant.dim() - tail :] if tail else ()
    return binding.constant.new_zeros(1, 1, event, *rest, value.numel(), dtype=torch.float64)
