"""Slices of a model's rows, where an enumerated run on all of them would make much."""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import Given
from pyro_em.tracing.sites import Role

_MANY = 2**21  # cells of all rows from which on slices are worth it

GAUSSIAN_ROWS = 2**17  # the same of rows with Gaussian latents, whatever their width

_OFTEN = 16  # slices after which what is left of them is looked for

_NOTED = 64

_CELLS = 2**16  # of a slice, of which a model makes numbers for each covariate


@dataclass(frozen=True, eq=False)
class Slices:
    """How a model's arguments are cut into slices of rows.

    Attributes:
        args: The positional arguments.
        parted: How many of them, the first ones, hold rows.
        structure: The skeleton of the model with all of them.
        plate: The plate whose elements they are.
        rows: How many there are.
        most: How many a slice has.
    """

    args: tuple
    parted: int
    structure: Structure
    plate: str
    rows: int
    most: int

    @classmethod
    def of(
        cls,
        args: tuple,
        kwargs: Mapping[str, Any],
        structure: Structure,
        roles: Collection[Role] = (Role.DATA, Role.CONJUGATE, Role.GAUSSIAN),
        many: int | None = None,
        most: int | None = None,
    ) -> Slices | None:
        """The slices of large data; None where the model is run on all of them.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            structure: The skeleton of the model with them.
            roles: What the sites that have a value may be.
            many: How many cells all rows have at least.
            most: How many a slice has.
        """
        plate = structure.data_plate
        if plate is None or structure.series is not None or structure.random_plates:
            return None
        if structure.kept_values or structure.coupled or not _are_of_rows(structure, plate):
            return None
        if len(structure.clamped) < len(structure.masked_pairs):
            return None
        rows = structure.plates[plate].size
        cells = max(_cells_of_row(structure, name) for name in structure.sites)
        numbers = max(_numbers_of_row(structure, name, plate) for name in structure.sites)
        given = [i.role for i in structure.sites.values() if i.observed]
        # At its unit a conjugate latent makes a number of each row of what is the same in all, and at
        # zero a Gaussian one makes vectors.
        least = _MANY // 8 if Role.CONJUGATE in given else _MANY
        least = GAUSSIAN_ROWS if Role.GAUSSIAN in given else least
        if numbers * rows < (many or least) or any(role not in roles for role in given):
            return None
        parted = 0
        while parted < len(args) and _rows(args[parted]) == rows:
            parted += 1
        others = (*args[parted:], *kwargs.values())
        if not parted or any(_rows(a) == rows for a in others):
            return None
        # A slice of one row would not show along which dimension it has rows.
        return cls(args, parted, structure, plate, rows, max(2, (most or _CELLS) // cells))

    def __iter__(self) -> Iterator[slice]:
        """Slices of about equal length.

        Distributions that are made of others (a Weibull) stay until Python looks for garbage, which is
        rare while a model is read; of many slices that would be as much as one run on all rows makes.
        """
        ends = np.linspace(0, self.rows, math.ceil(self.rows / self.most) + 1).astype(int).tolist()
        for i, (a, b) in enumerate(pairwise(ends), start=1):
            yield slice(a, b)
            if i % _OFTEN == 0 and gc.isenabled():
                gc.collect(0)

    @property
    def first(self) -> slice:
        """The rows of the run of which it is noted what the model does."""
        return slice(0, min(self.most, _NOTED))

    def spread(self, most: int) -> Tensor:
        """Some rows that lie far apart, in order. # (most or fewer,)"""
        return (
            torch.linspace(0, self.rows - 1, min(most, self.rows), dtype=torch.float64)
            .long()
            .unique()
        )

    def at(self, rows: slice | Tensor) -> tuple[tuple, Structure]:
        """The arguments and the skeleton of a model with some of the rows."""
        args = (*(a[rows] for a in self.args[: self.parted]), *self.args[self.parted :])
        size = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        own = replace(self.structure.plates[self.plate], size=size, full_size=size)
        plates = {**self.structure.plates, self.plate: own}
        return args, replace(self.structure, plates=plates, looked=None)


G = TypeVar("G", bound=Given)


def on_rows_of(model: G, structure: Structure) -> G:
    """A model with as many rows of its given latents as its data have, where these were cut.

    Args:
        model: The model, whose conjugate latents are at their units, its Gaussian ones at zero.
        structure: The skeleton of the model with the data at hand.
    """
    plate = structure.data_plate
    if plate is None:
        return model
    given = (Role.CONJUGATE, Role.GAUSSIAN)
    sites = {n: i for n, i in structure.sites.items() if i.role in given}
    batch_dims = {n: s.batch_dim for n, s in sites.items() if plate in s.plates}
    at = structure.plates[plate]
    return model.on_rows(at.dim, at.size, batch_dims)


def _are_of_rows(structure: Structure, plate: str) -> bool:
    """Whether Gaussian latents, if there are any, are each row's own, and none is conjugate."""
    sites = structure.sites.values()
    gaussian = [i for i in sites if i.role is Role.GAUSSIAN]
    if not gaussian:
        return not structure.lines
    if structure.lines and not structure.lines_of_rows:
        return False
    beside = any(i.role is Role.CONJUGATE for i in sites)
    return not beside and all(i.plates[:1] == (plate,) for i in gaussian)


def _cells_of_row(structure: Structure, name: str) -> int:
    """Values of the latents that a site reads, together."""
    sizes = (structure.sites[z].support_size or 1 for z in structure.sites[name].scope)
    return math.prod(sizes) if structure.sites[name].plates else 1


def _rows(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.dim() else None


def _numbers_of_row(structure: Structure, name: str, plate: str) -> int:
    """The same, as often as a row has elements of other plates."""
    inner = (structure.plates[p].size for p in structure.sites[name].plates if p != plate)
    return _cells_of_row(structure, name) * math.prod(inner)
