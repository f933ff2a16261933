"""Observed numbers whose arguments differ between components only, as rows for a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_em.graph.factors import Group


@dataclass(frozen=True, eq=False)
class SingleRows:
    """The values of sites, a row for each element of their members and plates.

    Attributes:
        value: # (rows, numbers)
        elements: Which of them count, where not all do. # (rows, numbers)
        lead: How many dimensions of the group are rows: members and plates.
        shape: Of the numbers of one row.
    """

    value: Tensor
    elements: Tensor | None
    lead: int
    shape: tuple[int, ...]


def single_rows(group: Group, family: str) -> SingleRows | None:
    """The rows of sites of a family; None where arguments or values are not those of single rows.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        family: The family's name.
    """
    if group.family is None or group.family.name != family or not group.observed:
        return None
    lead = 1 + group.n_plates
    value, rows = group.value, math.prod((len(group.members), *group.sizes[: group.n_plates]))
    if value.shape[lead] != 1 or rows == 1 or math.prod(value.shape[:lead]) != rows:
        return None
    if any(size != 1 for a in group.outlines.values() for size in a.shape[:lead]):
        return None
    elements = group.elements
    if elements is not None:
        if elements.shape[lead] != 1:
            return None
        elements = elements.expand(value.shape).reshape(rows, -1)
    return SingleRows(value.reshape(rows, -1), elements, lead, tuple(value.shape[lead + 1 :]))
