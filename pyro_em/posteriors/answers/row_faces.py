"""Draws and modes of the discrete latents of many rows, some rows at a time.

Rows are independent given the parameters, so that the tables of a contraction need not be there for all
of them at once. Draws are the same as of all rows together: the uniform numbers that they are made of
are drawn for all rows, one latent after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.continuous.table_rows import TableSlices
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import contraction_of
from pyro_em.posteriors.sampling import Codes, Conditional, Conditionals, conditionals, levels_of

_CELLS = 2**19  # numbers of a part, those of its data for each cell included


@dataclass(frozen=True, eq=False)
class RowFaces:
    """The discrete latents of many rows.

    Attributes:
        slices: The rows of each part.
        plate: Whose elements the rows are.
        plan: The order in which latents are summed.
        tables: Log densities per group, of all rows. # (members, rows, *sizes)
    """

    slices: TableSlices
    plate: str
    plan: ContractionPlan
    tables: Sequence[Tensor]

    @classmethod
    def of(cls, graph: FactorGraph, tables: Sequence[Tensor]) -> RowFaces | None:
        """Those of a graph; None where rows are few or do not stand by themselves.

        Args:
            graph: The factor graph.
            tables: Log densities per group. # (members, *sizes)
        """
        slices = TableSlices.of(graph, as_traced=True, cells=_CELLS)
        plate = graph.structure.data_plate
        if slices is None or plate is None or not graph.latents:
            return None
        return cls(slices, plate, contraction_of(graph), tables)

    @property
    def width(self) -> int:
        """Cells of the largest latent."""
        graph = self.slices.graph
        return max(_size(graph, z.plates) for z in graph.latents.values())

    def draw(self, n: int, generator: torch.Generator | None) -> Codes:
        """Joint draws: positions in the latents' supports. # (n, *plates)"""
        graph, levels, codes = self.slices.graph, dict[str, Tensor](), dict[str, Tensor]()
        for rows, part, tables in self.parts():
            found = Conditionals(part, conditionals(part, self.plan, tables))
            at = {c.latent: 1 + c.plates.index(self.plate) for c in found.found}
            if not levels:
                for c in found.found:
                    shape = [n, *(graph.dim_size(p) for p in c.plates)]
                    levels[c.latent] = levels_of(shape, c.cumulative.device, generator)
                    codes[c.latent] = levels[c.latent].new_empty(shape, dtype=torch.int64)

            def some(c: Conditional, at: dict[str, int] = at, rows: slice = rows) -> Tensor:
                return _of_rows(levels[c.latent], at[c.latent], rows)

            for name, own in found.at(some, n).items():
                _of_rows(codes[name], at[name], rows).copy_(own)
        return codes

    def parts(self) -> Iterator[tuple[slice, FactorGraph, list[Tensor]]]:
        """The rows of each part, their graph, and their tables."""
        for rows in self.slices.rows:
            part = self.slices.part(rows)
            size = rows.stop - rows.start
            own = replace(part.structure.plates[self.plate], size=size, full_size=size)
            plates = {**part.structure.plates, self.plate: own}
            part = replace(part, structure=replace(part.structure, plates=plates, looked=None))
            yield rows, part, [t[:, rows] for t in self.tables]


def _size(graph: FactorGraph, plates: Sequence[str]) -> int:
    size = 1
    for p in plates:
        size *= graph.dim_size(p)
    return size


def _of_rows(t: Tensor, along: int, rows: slice) -> Tensor:
    return t.narrow(along, rows.start, rows.stop - rows.start)
