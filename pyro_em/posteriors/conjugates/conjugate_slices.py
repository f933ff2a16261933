"""A conjugate block some rows at a time: what the data add to each element of its latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from pyro_em.graph.conjugate_children.conjugate_reads import ConjugateRead
from pyro_em.graph.many_rows.given_rows import slice_of
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_totals import Rows
from pyro_em.updates.expectations.conjugate_beliefs import MANY_ROWS

_WIDTH = 4  # numbers of a row up to which `MANY_ROWS` rows stay in the cache


@dataclass(frozen=True, eq=False)
class RowSlices:
    """A block whose sites share their first plate, each row of which stands by itself.

    Attributes:
        block: The block.
        inner: How many elements of the latent a row has.
        straight: For each site below the latent whether its rows read the elements in order.
    """

    block: ConjugateBlock
    inner: int
    straight: tuple[bool, ...]
    _parts: list[ConjugateBlock] = field(default_factory=list)
    _elements: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, block: ConjugateBlock, *, scoped: bool = False) -> RowSlices | None:
        """That of a block; None where rows read elements of others, or the table has other plates.

        Args:
            block: The block.
            scoped: Whether its sites may depend on discrete latents.
        """
        first = block.groups[0]
        if not (first.n_plates and block.plates) or (block.scope and not scoped):
            return None
        plate, rows = first.dims[0][0], first.sizes[0]
        if block.plates[0] != plate or rows < 2:
            return None
        if any(not g.n_plates or g.dims[0][0] != plate for g in block.groups):
            return None
        inner = block.count // rows
        straight = []
        for read, reading in zip(block.reads, block.readings, strict=True):
            at = read.elements
            straight.append(reading.in_order)
            if reading.in_order:
                continue
            if at.shape[1] != rows:
                return None
            begins = torch.arange(rows, device=at.device).mul_(inner)
            begins = begins.reshape(1, rows, *(1,) * (at.dim() - 2))
            if bool(((at >= 0) & ((at < begins) | (at >= begins + inner))).any()):
                return None
        return cls(block, inner, tuple(straight))

    @property
    def rows(self) -> list[slice]:
        """Rows, so many at a time that what is computed of them stays in the cache."""
        total = self.block.groups[0].sizes[0]
        width = max(g.value.numel() // total for g in self.block.groups)
        return even_slices(total, max(2, MANY_ROWS * _WIDTH // max(width, _WIDTH)))

    def parts(self) -> list[ConjugateBlock]:
        """The block of each of these, in memory that it shares."""
        if not self._parts:
            self._parts.extend(self.part(rows) for rows in self.rows)
        return self._parts

    def part(self, rows: slice) -> ConjugateBlock:
        """The block of some rows."""
        block, size = self.block, rows.stop - rows.start
        reads = [self._read(i, read, rows) for i, read in enumerate(block.reads)]
        weight = block.weight
        if weight is not None and weight.dim() and weight.shape[0] > 1:
            weight = weight[rows]
        return replace(
            block,
            groups=tuple(slice_of(g, rows) for g in block.groups),
            reads=tuple(reads),
            sizes=(size, *block.sizes[1:]),
            traced=(),
            weight=weight,
            _sums={},
            _equal=[],
        )

    def _read(self, i: int, read: ConjugateRead, rows: slice) -> ConjugateRead:
        """What a site reads, elements counted from the first of these rows."""
        order = read.order
        if order is not None and order.shape[1] > 1:
            order = order[:, rows]
        if not self.straight[i]:
            own = read.elements[:, rows]
            own = torch.where(own >= 0, own - rows.start * self.inner, -1)
            return replace(read, elements=own, order=order)
        size = rows.stop - rows.start
        if (i, size) not in self._elements:  # the same in all slices of a length
            self._elements[i, size] = read.elements[:, :size].clone()
        return replace(read, elements=self._elements[i, size], order=order)

    def constants(self, block: ConjugateBlock) -> Tensor:
        """Σ w log base of all sites below the latent, in nats. # ()"""
        return torch.stack([self._constants(part) for part in self.parts()]).sum()

    def _constants(self, part: ConjugateBlock) -> Tensor:
        parts = []
        for i in part.summed:
            own = part.bases(i, part.groups[i].arguments)
            if part.weight is not None:
                own = _weight_of_cells(part).dot(part.onto_table(i, own)[:, 0])
            parts.append(own.sum())
        return torch.stack(parts).sum()

    def __call__(self) -> Iterator[Rows]:
        """What the data add, and the weights of elements; see `conjugate_totals.Source`."""
        for part in self.parts():
            added = [part.added(i, part.groups[i].arguments) for i in part.summed]
            yield sum(added[1:], added[0]).expand(part.count, 1, -1)[:, 0], weights_of(part)


@dataclass(frozen=True, eq=False)
class CollectedElements:
    """What the data add to each element, of a block whose rows read elements of others.

    Attributes:
        added: Σ Δχ. # (elements, P)
    """

    added: Tensor

    @classmethod
    def of(cls, block: ConjugateBlock) -> CollectedElements | None:
        """That of a block without weights of its own; None where it has some."""
        if block.scope or block.weight is not None:
            return None
        total: Tensor | None = None
        for i in block.summed:
            for part in _children(block, i):
                own = part.added(1, part.groups[1].arguments)[:, 0]
                total = own if total is None else total.add_(own)
        return None if total is None else cls(total.expand(block.count, -1))

    def constants(self, block: ConjugateBlock) -> Tensor:
        """Σ log base of all sites below the latent, in nats. # ()"""
        parts = [
            part.bases(1, part.groups[1].arguments).sum()
            for i in block.summed
            for part in _children(block, i)
        ]
        return torch.stack(parts).sum()

    def __call__(self) -> Iterator[Rows]:
        """See `conjugate_totals.Source`."""
        for rows in even_slices(len(self.added), MANY_ROWS):
            yield self.added[rows], None


def weights_of(part: ConjugateBlock) -> Tensor | None:
    """How often each element of a latent counts; None where each counts once. # (elements,)"""
    if part.weight is None:
        return None
    weight, first = _weight_of_cells(part), part.groups[0]
    if first.dims[0][: first.n_plates] != part.plates or len(weight) != part.count:
        weight = weight[part.element_of_row(0, events=True)]
    return weight


def _weight_of_cells(part: ConjugateBlock) -> Tensor:
    assert part.weight is not None
    return part.weight.to(torch.float64).expand(part.sizes).reshape(-1)


def _children(block: ConjugateBlock, i: int) -> Iterator[ConjugateBlock]:
    """Blocks of the latent and one site below it, some rows of that site each."""
    group, read = block.groups[i], block.reads[i - 1]
    if not group.n_plates:
        groups = block.groups[0], group
        yield replace(block, groups=groups, reads=(read,), apart=0, traced=(), _sums={}, _equal=[])
        return
    width = max(1, group.value.numel() // max(group.sizes[0], 1))
    for rows in even_slices(group.sizes[0], max(1, MANY_ROWS * _WIDTH // max(width, _WIDTH))):
        at, order = read.elements, read.order
        at = at[:, rows] if at.shape[1] > 1 else at
        order = order[:, rows] if order is not None and order.shape[1] > 1 else order
        own = replace(read, elements=at, order=order)
        groups = block.groups[0], slice_of(group, rows)
        yield replace(block, groups=groups, reads=(own,), apart=0, traced=(), _sums={}, _equal=[])


def even_slices(count: int, most: int) -> list[slice]:
    """Slices of about equal length, of a number of rows each at the most."""
    parts = max(1, -(-count // most))
    ends = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]
