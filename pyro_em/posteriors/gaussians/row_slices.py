"""A Gaussian block of the rows of a plate, some at a time: the unknowns of a row stand by themselves.

How the unknowns of a part lie follows from how many rows it has: it is laid out once for each length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pyro_em.graph.factors import Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.many_rows.given_rows import slice_of
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.own_rows import own_rows
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape


@dataclass(frozen=True, eq=False)
class GaussianSlices:
    """The block in parts.

    Attributes:
        block: The block of all rows.
    """

    block: GaussianBlock
    _parts: dict[int, GaussianBlock] = field(default_factory=dict)

    @classmethod
    def of(cls, block: GaussianBlock) -> GaussianSlices | None:
        """That of a block of rows; None where these do not each read latents of their own alike.

        Args:
            block: The block.
        """
        first = block.groups[0]
        if type(block) is not GaussianBlock or not first.n_plates or not block.plates:
            return None
        if block.plates[0] != first.dims[0][0] or own_rows(block.groups, block.lines) is None:
            return None
        return cls(block)

    def part(self, rows: slice) -> GaussianBlock:
        """The block of some rows."""
        block, size = self.block, rows.stop - rows.start
        if size not in self._parts:
            lines = tuple(_line_of(line, size) for line in block.lines)
            groups = tuple(slice_of(g, slice(0, size)) for g in block.groups)
            sizes = (size, *block.sizes[1:])
            self._parts[size] = replace(block, groups=groups, lines=lines, sizes=sizes, traced=())
        like = self._parts[size]
        return like.with_groups(tuple(slice_of(g, rows) for g in block.groups))


def width_of(block: GaussianBlock) -> int:
    """About how many numbers the matrices and moments of a row have."""
    unknowns = sum(_of_row(g) for g in block.groups if g.role is Role.GAUSSIAN)
    data = sum(_of_row(g) for g in block.groups if g.role is not Role.GAUSSIAN)
    return math.prod(block.states) * (unknowns + data) * unknowns


def _of_row(group: Group) -> int:
    """How many numbers a row has of a site."""
    return math.prod(group.sizes[1 : group.n_plates]) * event_shape(group).numel()


def _line_of(line: Line, rows: int) -> Line:
    """What some rows read, counted from the first of them."""
    sizes = (rows, *line.sizes[1:])
    count = math.prod(sizes)
    reads = tuple(replace(r, elements=r.elements[:count].clone()) for r in line.reads)
    return replace(line, sizes=sizes, reads=reads)
