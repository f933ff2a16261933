"""Linear groups inside a kernel: features of rows, tables of a latent, known counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.densities.natural import Feature
from pyro_em.graph.bindings.binding import is_in_order
from pyro_em.graph.factors import Group


@dataclass(frozen=True, eq=False)
class Counted:
    """Groups that every row reads: ℓ = Θ Φ with Θ = η[columns], and back N = R Φᵀ.

    Attributes:
        few: Features of the rows, in float64; in any layout of `counted`. # (P, rows), or (P, values)
        columns: The elements of η. # (K, P)
        base: Σ h over all rows, once each. # (rows,)
        codes: Which value each row is, where rows take few. # (rows,)
    """

    few: Tensor
    columns: Tensor
    base: Tensor
    codes: Tensor | None = None

    @cached_property
    def phi(self) -> Tensor:
        """Features of the rows. # (P, rows)"""
        return self.few if self.codes is None else self.few.index_select(1, self.codes)

    def laid_out(self) -> Counted:
        """The same with the features of each row, one after the other."""
        return Counted(self.phi.contiguous(), self.columns, self.base)


@dataclass(frozen=True, eq=False)
class Cells:
    """A group that reads a latent and no row: one number per value of the latent, or of two.

    Attributes:
        cell: Which cell an entry is of. # (entries,)
        columns: The element of η that it adds. # (entries,)
        f: How often. # (entries,)
        base: h. # (cells,)
        is_plain: Whether each cell is one element of η.
    """

    cell: Tensor
    columns: Tensor
    f: Tensor
    base: Tensor
    is_plain: bool

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the elements of η are the first ones, in order."""
        return is_in_order(self.columns)

    def table(self, eta: Tensor) -> Tensor:
        """Log densities. # (cells,)"""
        if self.is_plain:
            return eta.take(self.columns)
        return self.base.index_add(0, self.cell, self.f * eta.take(self.columns))

    def counts(self, mass: Tensor) -> Tensor:
        """What posterior masses add to the elements of η. # (entries,)"""
        return mass if self.is_plain else self.f * mass[self.cell]


@dataclass(frozen=True, eq=False)
class Known:
    """A group that reads no latent: its features are summed once and for all.

    Attributes:
        columns: The elements of η. # (entries,)
        f: Sums over the data. # (entries,)
        base: Σ h.
    """

    columns: Tensor
    f: Tensor
    base: float


def counted(group: Group, features: Sequence[Feature], base: Tensor, K: int) -> Counted | None:
    """The rows of a group; None where an element of η depends on them.

    Args:
        group: A group whose last dimension is the latent and whose data do not depend on it; each
            member has rows of its own, before plates (the steps of a chain). Where all members read
            the same rows, see `pyro_em.densities.row_features`.
        features: Its features.
        base: h.
        K: Values of the latent.
    """
    lead = 1 + group.n_plates
    sizes = [len(group.members), *group.sizes[: group.n_plates]]
    weight = weights_of(group)
    if base.shape[lead] != 1:
        return None
    h = where_counted(base, weight).squeeze(lead).expand(sizes)
    codes = features[0].codes if weight is None else None
    if codes is not None:
        codes = codes.squeeze(tuple(range(lead, codes.dim()))).expand(sizes).reshape(-1)
        few = [len(features[0].few), *(1,) * group.n_plates]
    phis, columns = [], []
    for part in features:
        f, c = weighted(part.f, weight) if codes is None else part.few, part.columns
        if f.shape[lead] != 1 or any(size != 1 for size in c.shape[:lead]):
            return None
        read = sizes if codes is None else few
        f = f.expand(*read, *f.shape[lead:]).squeeze(lead)
        axes = [lead + i for i, size in enumerate(c.shape[lead + 1 :]) if size == 1]
        if axes:  # data that read the same element
            f = f.sum(axes, keepdim=True)
        phis.append(f.reshape(math.prod(read), -1).T)
        columns.append(c.reshape(c.shape[lead], -1).expand(K, -1))
    phi = phis[0] if len(phis) == 1 else torch.cat(phis)
    return Counted(phi, torch.cat(columns, 1), h.reshape(-1), codes)


def cells(group: Group, features: Sequence[Feature], base: Tensor) -> Cells:
    """The table of a group with one member and no rows."""
    lead = 1 + group.n_plates
    table = group.sizes[group.n_plates :]
    n = math.prod(table)
    places, columns, fs = [], [], []
    for part in features:
        f = part.f
        f = f.squeeze(tuple(range(lead))).expand(*table, *f.shape[lead + len(table) :])
        c = part.columns.squeeze(tuple(range(lead)))
        f, c = f.reshape(n, -1), c.expand(*table, *c.shape[len(table) :]).reshape(n, -1)
        f, c = torch.broadcast_tensors(f, c)
        place = f.nonzero(as_tuple=True)
        places.append(place[0])
        columns.append(c[place])
        fs.append(f[place])
    cell, f = torch.cat(places), torch.cat(fs)
    rest = base.squeeze(tuple(range(lead))).expand(table).reshape(-1).contiguous()
    in_order = len(cell) == n and bool((cell == torch.arange(n, device=cell.device)).all())
    is_plain = in_order and bool((f == 1).all()) and bool((rest == 0).all())
    return Cells(cell, torch.cat(columns), f, rest, is_plain)


def known(group: Group, features: Sequence[Feature], base: Tensor) -> Known:
    """The sums of a group that reads no latent."""
    sizes = (len(group.members), *group.sizes)
    weight = weights_of(group)
    columns, fs = [], []
    for part in features:
        f = weighted(part.f, weight)
        f = f.expand(*sizes, *f.shape[len(sizes) :])
        f, c = torch.broadcast_tensors(f, part.columns)
        total = f.new_zeros(int(c.max()) + 1).index_add_(0, c.reshape(-1), f.reshape(-1))
        used = total.nonzero().reshape(-1)
        columns.append(used)
        fs.append(total[used])
    return Known(
        torch.cat(columns), torch.cat(fs), float(where_counted(base, weight).expand(sizes).sum())
    )


def weights_of(group: Group) -> Tensor | None:
    """Where a group counts; None where all of it does. # (members or 1, *sizes or 1s)"""
    return None if group.mask is None else group.mask.to(torch.float64)


def where_counted(base: Tensor, weight: Tensor | None) -> Tensor:
    """h where a datum counts; the value that stands for a masked one may be impossible."""
    return base if weight is None else torch.where(weight > 0, base * weight, 0.0)


def weighted(f: Tensor, weight: Tensor | None) -> Tensor:
    """A feature of data, as often as each counts."""
    if weight is None:
        return f
    return f * weight.reshape(weight.shape + (1,) * (f.dim() - weight.dim()))


@dataclass(frozen=True, eq=False)
class Lookup:
    """A linear group whose rows each have one feature, and that feature is one.

    Attributes:
        index: The symbol of each row; one past the last where a row is masked. # (rows,)
        often: How many rows have it. # (S,) or (S + 1,)
        columns: The elements of η. # (S, K)
    """

    index: Tensor
    often: Tensor
    columns: Tensor

    def table(self, eta: Tensor) -> Tensor:
        """Log densities of the symbols; zero where a row is masked. # (S or S + 1, K)"""
        table = eta.take(self.columns)
        if len(self.often) == len(table):
            return table
        return torch.cat([table, table.new_zeros(1, table.shape[1])])

    def rows(self, table: Tensor) -> Tensor:
        """A table's row for each row of the data. # (rows, K)"""
        return table.index_select(0, self.index)

    def counts(self, rows: Tensor) -> Tensor:
        """Posterior masses of rows, summed per symbol, as the elements of η have them. # (K * S,)"""
        S, K = self.columns.shape
        total = rows.new_zeros(len(self.often), K).index_add_(0, self.index, rows)
        return total[:S].T.reshape(-1)


def as_lookup(part: Counted) -> Lookup | None:
    """The lookup that rows are, or None where a row has other features than one that is one."""
    rows = part.few.T
    if not rows.numel():
        return None
    S = len(part.few)
    index = (rows @ torch.arange(S).to(rows)).long().clamp_(0, S - 1)
    is_one = rows.gather(1, index.unsqueeze(1)).squeeze(1) == 1
    if int(rows.count_nonzero()) != int(is_one.sum()):
        return None
    is_whole = bool(is_one.all())
    index = index if is_whole else torch.where(is_one, index, S)
    if part.codes is not None:
        index = index.index_select(0, part.codes)
    often = torch.bincount(index, minlength=S if is_whole else S + 1).to(torch.float64)
    return Lookup(index, often, part.columns.T.contiguous())
