"""How conjugate latents of many rows enter the sites below them, read some rows at a time.

A run at random values of all latents, its derivatives and a second run make a dozen vectors of the
data's length, and what stays is the number of the element that each row reads. So slices of rows are
read one after the other, each with its own proof, and what they say is put side by side. That is what
all rows read only if the model says of a row the same whichever rows are beside it: a few rows, far
apart, are read by themselves to see that, and so are those that later runs are held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.graph.conjugate_children.conjugate_model import ConjugateModel
from pyro_em.graph.conjugate_children.conjugate_reads import differing_reads, read_conjugates
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, NotConjugate
from pyro_em.graph.many_rows.slices import Slices
from pyro_em.tracing.sites import Role

Reads = dict[str, ConjugateRead]

_MANY = 1 << 17  # rows from which on they are read in slices
_SLICE = 1 << 16  # rows of a slice
_FEW = 64  # rows that are read by themselves
_LATER = 4096  # rows with which a later run is compared


@dataclass(frozen=True, eq=False)
class _Rows:
    """A model with conjugate latents, and its slices.

    Attributes:
        given: The model with its conjugate latents given.
        slices: Of its positional arguments.
    """

    given: ConjugateModel
    slices: Slices

    @classmethod
    def of(cls, given: ConjugateModel) -> _Rows | None:
        """That of large data; None where all rows are read at once."""
        run, roles = (given.args, given.kwargs, given.structure), (Role.DATA, Role.CONJUGATE)
        slices = Slices.of(*run, roles, _MANY, _SLICE)
        if slices is None:
            return None
        # A slice holds as many numbers of vectors as of single ones.
        width = max(math.prod(a.shape[1:]) for a in slices.args[: slices.parted])
        return cls(given, replace(slices, most=max(2, slices.most // max(width, 1))))

    def axis(self, latent: str) -> int | None:
        """The dimension of the rows in a latent's value; None where it is outside of their plate."""
        structure, plate = self.slices.structure, self.slices.plate
        if plate not in structure.sites[latent].plates:
            return None
        event = self.given.kernels[latent].event_dim
        return self.given.model.values[latent].dim() - event + structure.plates[plate].dim

    def at(self, rows: slice | Tensor) -> ConjugateModel:
        """The model with some rows."""
        args, structure = self.slices.at(rows)
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        values = {}
        for name, value in self.given.model.values.items():
            axis = self.axis(name)
            values[name] = value if axis is None else value.narrow(axis, 0, count)
        model = self.given.model.at(values)
        return replace(self.given, model=model, args=args, structure=structure)

    def read(self, rows: slice | Tensor) -> Reads:
        """What some rows read, by themselves."""
        return read_conjugates(self.at(rows))

    def dimension(self, read: ConjugateRead) -> int | None:
        """The dimension of the rows in what a site reads; None where all rows read the same."""
        plates = self.slices.structure.sites[read.site].plates
        if self.slices.plate not in plates:
            return None
        found = plates.index(self.slices.plate)
        return found if read.elements.shape[found] > 1 else None

    def widened(self, read: ConjugateRead) -> ConjugateRead:
        """What a site reads, with the room for all rows."""
        at = self.dimension(read)
        if at is None:
            return read

        def wide(t: Tensor) -> Tensor:
            return t.new_empty((*t.shape[:at], self.slices.rows, *t.shape[at + 1 :]))

        order = read.order
        if order is not None and order.shape[at] > 1:
            order = wide(order)
        return replace(read, elements=wide(read.elements), order=order)

    def put(self, whole: ConjugateRead, read: ConjugateRead, rows: slice) -> bool:
        """Take in what some rows read; whether that is of the form of the first ones."""
        here = self.some(whole, rows)
        if self.dimension(read) is not None and here.elements.shape == read.elements.shape:
            here.elements.copy_(read.elements)
            if here.order is not None and read.order is not None:
                if here.order.shape != read.order.shape:
                    return False
                here.order.copy_(read.order)
        return self.agrees(here, read)

    def some(self, read: ConjugateRead, rows: slice | Tensor) -> ConjugateRead:
        """What some of the rows read, in memory that it shares where these are a slice."""
        at = self.dimension(read)
        if at is None:
            return read

        def cut(t: Tensor) -> Tensor:
            if t.shape[at] == 1:
                return t
            if isinstance(rows, slice):
                return t.narrow(at, rows.start, rows.stop - rows.start)
            return t.index_select(at, rows.to(t.device))

        order = None if read.order is None else cut(read.order)
        return replace(read, elements=cut(read.elements), order=order)

    def agrees(self, one: ConjugateRead, two: ConjugateRead) -> bool:
        """Whether two say the same."""
        orders = one.order, two.order
        if (one.latent, one.pair, one.power) != (two.latent, two.pair, two.power):
            return False
        if orders[0] is None or orders[1] is None:
            return orders[0] is orders[1] and torch.equal(one.elements, two.elements)
        return torch.equal(one.elements, two.elements) and torch.equal(*orders)  # type: ignore[arg-type]

    def moved(self, read: ConjugateRead, rows: tuple[int, int], to: Tensor | int) -> Tensor:
        """Elements of a latent of some rows as those of a latent of others; −1 where one has no such.

        Args:
            read: What a site reads.
            rows: How many rows the latent has, and how many the other one.
            to: Which row of the other latent each is, or which the first one is.
        """
        axis, (count, size) = self.axis(read.latent), rows
        if axis is None:
            return read.elements
        value = self.given.model.values[read.latent]
        inner = math.prod(
            value.shape[axis + 1 : value.dim() - self.given.kernels[read.latent].event_dim]
        )
        at = read.elements.clamp(min=0)
        row = at // inner % count
        moved = row + to if isinstance(to, int) else to.to(at.device)[row]
        out = (at // (inner * count) * size + moved) * inner + at % inner
        return torch.where((read.elements >= 0) & (moved >= 0), out, -1)


def read_by_rows(given: ConjugateModel) -> Reads | None:
    """What every site reads of conjugate latents; None where all rows have to be seen at once.

    Args:
        given: The model with its conjugate latents given.
    """
    rows = _Rows.of(given)
    if rows is None:
        return None
    few, total = rows.slices.spread(_FEW), rows.slices.rows
    whole: Reads = {}
    try:
        for part in rows.slices:
            size = part.stop - part.start
            for site, read in rows.read(part).items():
                own = replace(read, elements=rows.moved(read, (size, total), part.start))
                if not part.start:
                    whole[site] = rows.widened(own)
                if site not in whole or not rows.put(whole[site], own, part):
                    return None
        alone = rows.read(few)
    except (PyroEMError, NotConjugate, RuntimeError, ValueError, IndexError):
        return None  # what is wrong is said of all rows
    for site, read in alone.items():
        own = replace(read, elements=rows.moved(read, (len(few), total), few))
        if site not in whole or not rows.agrees(rows.some(whole[site], few), own):
            return None
    return whole if alone.keys() == whole.keys() else None


def differing_by_rows(
    reads: Mapping[str, ConjugateRead],
    given: ConjugateModel,
    at: Mapping[str, Tensor] | None = None,
) -> list[tuple[str, str]] | None:
    """As `differing_reads`, of a few rows of large data; None where all rows have to be seen.

    Args:
        reads: What was found, some rows at a time.
        given: The model with its conjugate latents given.
        at: Parameters at which to look; the current ones where None.
    """
    rows = _Rows.of(given)
    if rows is None:
        return None
    few, total = rows.slices.spread(_LATER), rows.slices.rows
    place = torch.full((total,), -1)
    place[few] = torch.arange(len(few))
    own = {}
    for site, read in reads.items():
        some = rows.some(read, few)
        elements = rows.moved(some, (total, len(few)), place)
        if not bool(((elements >= 0) == (some.elements >= 0)).all()):
            return None
        own[site] = replace(some, elements=elements)
    return differing_reads(own, rows.at(few), at)
