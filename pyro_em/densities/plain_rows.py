"""Which groups hold a row for each element of their members and plates, and arguments for none."""

from __future__ import annotations

import math

from pyro_em.graph.factors import Group


def count_of_rows(group: Group, may_be_one: bool = False) -> int | None:
    """How many rows a group has whose arguments differ between components only; None for others.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        may_be_one: Whether a single row is some, as one of many.
    """
    lead = 1 + group.n_plates
    shape = group.value.shape
    rows = math.prod((len(group.members), *group.sizes[: group.n_plates]))
    if shape[lead] != 1 or math.prod(shape[:lead]) != rows or (rows == 1 and not may_be_one):
        return None
    if any(size != 1 for a in group.outlines.values() for size in a.shape[:lead]):
        return None
    return rows
