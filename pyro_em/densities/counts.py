"""Rows of counts whose densities are linear in which numbers a count is above: by tables.

    ℓ_k(x) = t_k[x],    t_k[v] = Σ_{j<v} η_j(a_k) − A(a_k) + h(v)

A density is evaluated once for each count that there may be, and not for each row; sums over rows are
histograms of responsibilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.density import PlainRows
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.families.family import Family, Statistics
from pyro_em.families.overdispersed import MANY, above, histogram
from pyro_em.graph.all_data import AllData
from pyro_em.graph.factors import Group


@dataclass(frozen=True, eq=False)
class Tables:
    """Log densities of all counts.

    Attributes:
        table: Zero at the last level, which stands for what is masked. # (numbers, K, levels)
        size: No term is expanded.
    """

    table: Tensor
    size: float = 0.0

    def part(self, cells: slice) -> Tables:
        """Some of the components."""
        return Tables(self.table[:, cells])


@dataclass(eq=False)
class CountRows(PlainRows):
    """The rows of a group of counts, with component-wise arguments.

    Attributes:
        family: The record.
        levels: Of each number of an event; the last where it is masked. # (numbers, rows)
        largest: The largest count.
        K: Components.
        lead: Dimensions of the group before the component's: members and plates.
        shape: The ``to_event`` dimensions of a datum.
    """

    family: Family
    levels: Tensor
    largest: int
    K: int
    lead: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return len(self.levels) + self.K

    def prepare(self, arguments: Mapping[str, Tensor]) -> Tables:
        """The tables at some arguments."""
        form = self.family.natural
        assert form is not None and form.coefficients is not None and form.base is not None
        wide = {name: a.to(torch.float64) for name, a in arguments.items()}
        found = form.coefficients(wide, self.largest)
        found = found.reshape(found.shape[self.lead :])
        found = found.expand(self.K, *self.shape, self.largest + 1).reshape(
            self.K, -1, self.largest + 1
        )
        values = torch.arange(self.largest + 1, dtype=torch.float64, device=found.device)
        table = torch.cat([found[..., -1:], found[..., :-1]], -1).cumsum(-1) + form.base(values)
        masked = table.new_zeros(*table.shape[:-1], 1)
        return Tables(torch.cat([table, masked], -1).transpose(0, 1).contiguous())

    def features(self, rows: slice, p: Tables | None = None) -> Tensor:
        """The levels of some rows. # (numbers, rows)"""
        return self.levels[:, rows]

    def log_density(self, p: Tables, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out: Tensor | None = None
        for table, index in zip(p.table, features, strict=True):
            found = table.index_select(1, index)
            out = found if out is None else out.add_(found)
        assert out is not None
        return out if onto is None else out.add_(onto)

    def moments(self, p: Tables, weights: Tensor, features: Tensor) -> Tensor:
        """Σ r of some rows at each level. # (K, numbers * levels)"""
        columns = weights.to(torch.float64).T.contiguous()
        size = self.largest + 2
        return torch.cat([histogram(columns, index, size) for index in features], -1)

    def statistics(
        self, p: Tables, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        found = moments.reshape(*(1,) * self.lead, self.K, *self.shape, self.largest + 2)[..., :-1]
        return {"feature": above(found), "weight": found.sum(-1)}


def as_counts(group: Group, K: int, all_data: AllData | None = None) -> CountRows | None:
    """The rule of sites of counts whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
        all_data: What is known of all data, where the group holds a part of them.
    """
    if group.family is None or group.family.natural is None or not group.observed:
        return None
    form = group.family.natural
    if not form.of_counts or form.per_level > 1:
        return None
    # A row of many has the levels of all: sums of parts are of one size.
    is_part = all_data is not None and all_data.rows != 1
    lead, value, rows = 1 + group.n_plates, group.value, count_of_rows(group, is_part)
    if rows is None:
        return None
    shape = tuple(value.shape[lead + 1 :])
    levels = value.long()
    largest = int(levels.max()) if all_data is None else all_data.largest[group.members[0]]
    if largest > MANY:
        return None
    if group.elements is not None:
        if group.elements.shape[lead] != 1:
            return None
        levels = torch.where(group.elements, levels, largest + 1)
    levels = levels.reshape(rows, -1).T.contiguous()
    return CountRows(group.family, levels, largest, K, lead, shape)
