"""Where the unknowns of blocks lie: in one flat vector, and their matrices in another.

A large block that falls apart without a few latents (`leaf_search`) is a dense *core* and *leaves*. Of
a leaf's matrix only its own rows lie in memory: p columns for itself, and q for what it reads of the
core. No row reads two leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """Where the Q coordinates that the rows of a site read lie in the flat vectors and matrices.

    Attributes:
        vector: Places in a flat vector; 0 where nothing is read. # (rows, Q)
        row: Places of the first number of their rows in the flat matrices. # (rows, Q)
        column: Columns inside those rows. # (rows, Q)
        present: False where nothing is read; None if every row reads every term. # (rows, Q)
        in_core: Which coordinates are the core's, where rows also read leaves; `column` is then the
            column in the leaf's rows. None where all are of one kind. Q
        core_column: The columns of these in the core's rows. # (rows, Q)
        common: Which coordinates are the same in all rows, as weights are; None if none is. Q
    """

    vector: Tensor
    row: Tensor
    column: Tensor
    present: Tensor | None = None
    in_core: tuple[bool, ...] | None = None
    core_column: Tensor | None = None
    common: tuple[bool, ...] | None = None

    @property
    def size(self) -> int:
        """Q."""
        return int(self.vector.shape[1])

    def pairs(self, rows: slice = slice(None)) -> Tensor:
        """Places of all pairs of the coordinates in the flat matrices. # (rows, Q, Q)"""
        return places_of(self, self, rows)

    def beside(self, other: Reading) -> Reading:
        """These coordinates followed by those of another reading of the same rows."""
        present = None
        if self.present is not None or other.present is not None:
            present = torch.cat([_all_present(self), _all_present(other)], -1)
        in_core = core_column = None
        if self.in_core is not None or other.in_core is not None:
            in_core = self.of_core + other.of_core
            core_column = torch.cat([self.columns_in_core, other.columns_in_core], -1)
        common = None
        if self.common is not None or other.common is not None:
            parts = (x.common or (False,) * x.size for x in (self, other))
            common = tuple(kind for part in parts for kind in part)
        return Reading(
            torch.cat([self.vector, other.vector], -1),
            torch.cat([self.row, other.row], -1),
            torch.cat([self.column, other.column], -1),
            present,
            in_core,
            core_column,
            common,
        )

    @property
    def runs(self) -> list[Run]:
        """Stretches of coordinates of one kind."""
        none = (False,) * self.size
        kinds = zip(self.in_core or none, self.common or none, strict=True)
        out, begin = [], 0
        for (in_core, common), run in groupby(kinds):
            end = begin + sum(1 for _ in run)
            out.append(Run(slice(begin, end), in_core, common))
            begin = end
        return out

    @property
    def of_core(self) -> tuple[bool, ...]:
        """Which coordinates are the core's beside those of leaves. Q"""
        return (False,) * self.size if self.in_core is None else self.in_core

    @property
    def columns_in_core(self) -> Tensor:
        """Their columns in the core's rows; any number of the others. # (rows, Q)"""
        return self.column if self.core_column is None else self.core_column


@dataclass(frozen=True, eq=False)
class Members:
    """The elements of one latent that lie in one bucket.

    Attributes:
        site: The number of the latent's site.
        elements: Which ones; None if all of them. # (n,)
        positions: The column of each element's first coordinate in its block. # (n,)
        parents: For each term the elements read, by their rank among the parent's members of the
            bucket; None for a term that none of these elements reads. # (n,) each
        columns: For each term of a leaf that reads the core the column of the element's first
            coordinate; None for the others. # (n,) each
    """

    site: int
    elements: Tensor | None
    positions: Tensor
    parents: tuple[Tensor | None, ...]
    columns: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks whose matrices are padded to one size.

    Attributes:
        first: The number of its first block.
        count: B, the blocks.
        size: d, the rows and columns of each matrix.
        vector: Where its vectors lie in the flat vector; B·d places.
        matrix: Where its matrices lie in the flat matrices; B·d·d places.
        members: Its elements, latent by latent in topological order.
        order: For each row of the batch of matrices its place among the members' coordinates, one
            latent after the other; the place after the last for padding. # (B * d,)
    """

    first: int
    count: int
    size: int
    vector: slice
    matrix: slice
    members: tuple[Members, ...]
    order: Tensor

    @property
    def columns(self) -> int:
        """The columns of each matrix."""
        return self.size


@dataclass(frozen=True, eq=False)
class Leaves(Bucket):
    """Leaves whose rows are padded to one form; `count`, `size` and the rest are of leaves.

    Attributes:
        reads: q, how many coordinates of the core each of them reads.
        block: The block of each leaf. # (J,)
        boundary: Places of these coordinates, as a reading of the core. # (J, q)
        matrix_of_core: The core's matrix in the flat matrices, if it is the same for all leaves.
        is_whole: Whether each leaf reads all of it, in its order.
    """

    reads: int = field(kw_only=True)
    block: Tensor = field(kw_only=True)
    boundary: Reading = field(kw_only=True)
    matrix_of_core: slice | None = field(kw_only=True)
    is_whole: bool = field(kw_only=True)

    @property
    def columns(self) -> int:
        """The columns of each matrix: those of the leaf, then those of the core."""
        return self.size + self.reads


@dataclass(frozen=True)
class Run:
    """Neighbouring coordinates of one kind.

    Attributes:
        own: Which ones.
        in_core: Whether they are the core's, beside those of leaves.
        common: Whether they are the same in all rows.
    """

    own: slice
    in_core: bool
    common: bool


def places_of(a: Reading, b: Reading, rows: slice = slice(None)) -> Tensor:
    """Places of all pairs of coordinates that the same rows read. # (rows, Q_a, Q_b)

    Where one is a leaf's and the other the core's, it is that of the leaf's row: matrices that are not
    symmetric are read with the leaf's coordinates first.
    """
    if a.in_core is None or b.in_core is None:
        return a.row[rows].unsqueeze(-1) + b.column[rows].unsqueeze(-2)
    parts = [torch.cat([places_between(a, i, b, j, rows) for j in b.runs], -1) for i in a.runs]
    return torch.cat(parts, -2)


def places_between(a: Reading, i: Run, b: Reading, j: Run, rows: slice = slice(None)) -> Tensor:
    """The same of some of the coordinates. # (rows, q_a, q_b)"""
    row, column = a.row[rows, i.own].unsqueeze(-1), b.column[rows, j.own].unsqueeze(-2)
    if a.in_core is None or b.in_core is None or not i.in_core:
        return row + column
    if j.in_core:
        return row + b.columns_in_core[rows, j.own].unsqueeze(-2)
    return b.row[rows, j.own].unsqueeze(-2) + a.column[rows, i.own].unsqueeze(-1)


def _all_present(reading: Reading) -> Tensor:
    if reading.present is not None:
        return reading.present
    return torch.ones_like(reading.vector, dtype=torch.bool)
