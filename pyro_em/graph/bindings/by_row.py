"""Selections whose index is a number of each row plus one of each cell: chosen by a known group.

In ``p[g]`` row n reads the elements K g_n + k. All of them are N K numbers; held as

    index_n,k = i_n + j_k

they are N + K, and are added when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import ElementwiseMap, Selection


class ByRow(Selection):
    """A selection of all elements of an argument, whose index is the sum of two.

    Args:
        param: The parameter's name.
        index: The whole index, where it is not given by its parts.
        maps: As of any selection.
        factor: As of any selection.
        parts: Numbers of the rows, and of the cells. # argument's shape each
    """

    def __init__(
        self,
        param: str,
        index: Tensor | None = None,
        maps: tuple[ElementwiseMap, ...] = (),
        factor: Tensor | None = None,
        parts: tuple[Tensor, ...] = (),
    ) -> None:
        own = parts if index is None else (index,)
        for name, value in (("param", param), ("maps", maps), ("factor", factor), ("_parts", own)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, selection: Selection, at: int) -> ByRow | None:
        """A selection in this form; None where its index is no such sum.

        Args:
            selection: One of all elements.
            at: The dimension of the rows.
        """
        index = selection.index
        rows = index
        for d in range(index.dim()):
            rows = rows if d == at else rows.narrow(d, 0, 1)
        cells = index.narrow(at, 0, 1) - rows.narrow(at, 0, 1)
        if not torch.equal(rows + cells, index):
            return None
        own = tuple(t.expand(index.shape) for t in (rows.clone(), cells))
        return cls(selection.param, None, selection.maps, selection.factor, own)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """See `Selection.parts`."""
        found: tuple[Tensor, ...] = self._parts  # type: ignore[attr-defined]
        return found

    @property
    def index(self) -> Tensor:  # type: ignore[override]
        """The whole index, computed at each look. # argument's shape"""
        first, *others = self.parts
        return sum((once_each(t) for t in others), once_each(first)).expand(first.shape)

    @property
    def of_kinds_of_rows(self) -> Tensor:
        """See `Selection.of_kinds_of_rows`."""
        if len(self.parts) < 2:
            return super().of_kinds_of_rows
        rows, cells = map(once_each, self.parts)
        return rows.unique().reshape(-1, *(1,) * cells.dim()) + cells

    @cached_property
    def is_whole(self) -> bool:
        """See `Selection.is_whole`."""
        return True

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Selection:
        """See `Selection.mapped`."""
        factor = None if self.factor is None else change(self.factor)
        own = tuple(change(t) for t in self.parts)
        return ByRow(self.param, None, self.maps, factor, own)

    @cached_property
    def alone(self) -> Selection:
        """See `Selection.alone`."""
        return self.mapped(lambda t: t.unsqueeze(0))
