"""Which rule evaluates Gaussian rows with missing entries: by patterns, or feature by feature."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.densities.incomplete import Incomplete
from pyro_em.densities.masked import Masked
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.graph.all_data import AllData, Centre
from pyro_em.graph.factors import Group, is_incomplete, seen_entries
from pyro_em.pieces import pieces

_ROWS = 2**16  # that are looked at together


def as_incomplete(
    group: Group, K: int, all_data: AllData | None = None
) -> Incomplete | Masked | None:
    """The rule of Gaussian sites with missing entries, or None; see `as_gaussian`."""
    lead = 1 + group.n_plates
    value = group.value
    if group.family is None:
        return None
    rows = count_of_rows(group)
    if rows is None:
        return None
    event, seen = value.shape[lead + 1 :], seen_entries(group)
    if seen is None or len(event) != 1 or seen.shape[lead] != 1:
        return None
    kind: type[Incomplete] | type[Masked]
    if is_incomplete(group) and not group.event_dims:
        kind, spread = Incomplete, next(n for n in group.arguments if n != "loc")
    elif group.family.name == "Normal" and group.event_dims == 1 and group.elements is not None:
        kind, spread = Masked, "scale"
    else:
        return None
    known = None if all_data is None else all_data.centres.get(group.members[0])
    seen = seen.expand(torch.broadcast_shapes(seen.shape, value.shape)).reshape(rows, -1)
    x, centre = _centred(value.reshape(rows, -1), seen, known)
    reach2 = None if known is None else known.reach2
    return kind(x, centre, kind is Masked, spread, K, False, lead, reach2)


def _centred(value: Tensor, seen: Tensor, known: Centre | None) -> tuple[Tensor, Tensor]:
    """The data about the mean of what is seen, NaN where nothing is, and that. # (D, N), (D,)"""
    x = value.new_empty(value.shape[1], len(value), dtype=torch.float64)
    for begin in range(0, len(value), _ROWS):
        rows = slice(begin, begin + _ROWS)
        x[:, rows] = torch.where(seen[rows], value[rows], torch.nan).T
    if known is None:  # of one column after the other: a mean makes several numbers of each
        centre = torch.stack([_mean(column) for column in x])
    else:
        centre = known.mean
    return x.sub_(centre.unsqueeze(-1)), centre


def _mean(column: Tensor) -> Tensor:
    """The mean of what is seen; zero where nothing is. # () from (N,)"""
    parts = [part for (part,) in pieces(column)]
    seen = sum(int(torch.count_nonzero(part == part)) for part in parts)
    return torch.stack([part.nansum() for part in parts]).sum() / max(seen, 1)
