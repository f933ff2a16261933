"""Rows of observed numbers whose arguments differ between components only: what their kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import PlainRows
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import Group


@dataclass(eq=False)
class Chunk:
    """Some rows, and what both halves of an E-step need of them.

    Attributes:
        value: # (numbers, rows)
        seen: Which numbers count; None where all do. # (numbers, rows)
        kept: Two tables of each number, of what its kind says. # (K, rows) each
    """

    value: Tensor
    seen: Tensor | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class SingleRows(PlainRows):
    """The values of sites, a row for each element of their members and plates.

    Attributes:
        value: # (rows, numbers)
        elements: Which of them count, where not all do. # (rows or 1, numbers)
        K: Components.
        lead: How many dimensions of the group are rows: members and plates.
        shape: The ``to_event`` dimensions of a datum.
    """

    family: ClassVar[str]

    value: Tensor
    elements: Tensor | None
    K: int
    lead: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, group: Group, K: int) -> Self | None:
        """The rows of sites of the family; None where arguments or values are not those of single rows.

        Args:
            group: A collapsed group; its members and plates are the rows, members first.
            K: Number of components.
        """
        if group.family is None or group.family.name != cls.family or not group.observed:
            return None
        lead = 1 + group.n_plates
        value, rows = group.value, count_of_rows(group)
        if rows is None:
            return None
        elements = group.elements
        if elements is not None:
            if elements.shape[lead] != 1:
                return None
            elements = elements.expand(value.shape).reshape(rows, -1)
        numbers = cls.read(value.reshape(rows, -1))
        return cls(numbers, elements, K, lead, tuple(value.shape[lead + 1 :]))

    @classmethod
    def read(cls, value: Tensor) -> Tensor:
        """What is computed with of the data: these themselves. # (rows, numbers)"""
        return value

    def each(self, arguments: Mapping[str, Tensor], name: str) -> Tensor:
        """An argument, number by number. # (numbers, K, 1)"""
        t = arguments[name].to(torch.float64)
        t = t.reshape(t.shape[self.lead :]).expand(self.K, *self.shape)
        return t.reshape(self.K, -1).T.unsqueeze(-1)

    def features(self, rows: slice, p: object = None) -> Chunk:
        """Some rows."""
        seen = self.elements
        if seen is not None:
            seen = (seen[rows] if len(seen) > 1 else seen).T
        return Chunk(self.value[rows].to(torch.float64).T.contiguous(), seen)

    def as_statistics(self, feature: Tensor, weight: Tensor) -> Statistics:
        """Sums over rows as the statistics of the group.

        Args:
            feature: # (K, numbers, P)
            weight: # (K, numbers)
        """
        lead = (1,) * self.lead
        return {
            "feature": feature.reshape(*lead, self.K, *self.shape, -1),
            "weight": weight.reshape(*lead, self.K, *self.shape),
        }
