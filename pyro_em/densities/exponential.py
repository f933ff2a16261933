"""Rows of densities that are linear in statistics of the data, jointly in several arguments.

    ℓ_k(x) = Σ_p η_p(a_k) T_p(x) − A(a_k)

One product gives all log densities and one all sums, whatever the family is: its record says T, η and A
(`pyro_em.families.family.NaturalForm`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.densities.compiled import Loop, Numbers, as_numbers
from pyro_em.densities.density import PlainRows
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.errors import Handover
from pyro_em.families import saddle_point
from pyro_em.families.family import Family, Statistics
from pyro_em.graph.factors import Group

_MANY = 512  # coefficients from which on products of matrices are quicker than a compiled loop

_KEPT = 2**20  # numbers of statistics that are made once for all steps


@dataclass(frozen=True, eq=False)
class Coefficients:
    """The coefficients of the statistics at some arguments.

    Attributes:
        linear: η; and −A, where numbers of an event are counted one by one. # (K, P)
        constant: −A, summed over the numbers of an event. # (K, 1)
        size: No term is expanded.
    """

    linear: Tensor
    constant: Tensor
    size: float = 0.0

    def part(self, cells: slice) -> Coefficients:
        """Some of the components."""
        return Coefficients(self.linear[cells], self.constant[cells])


@dataclass(eq=False)
class Exponential(PlainRows):
    """The rows of a group in linear form, with component-wise arguments.

    Attributes:
        family: The record.
        value: The data. # (rows, *to_event, *event)
        elements: Which numbers of an event count, where some are masked. # (rows or 1, *to_event)
        K: Components.
        lead: Dimensions of the group before the component's: members and plates.
        shape: The ``to_event`` dimensions of a datum.
        parts: Statistics of each number of an event.
        stored: Statistics of all rows, where they take less than the log densities do. # (P, N)
    """

    family: Family
    value: Tensor
    elements: Tensor | None
    K: int
    lead: int
    shape: tuple[int, ...]
    parts: int = field(init=False)
    stored: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.parts = int(self._statistics(slice(0, 1)).shape[-1])
        if self.width * len(self.value) <= _KEPT or 2 * self.width <= self.K:
            self.stored = self._features_of(slice(None)).contiguous()

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return math.prod(self.shape) * (self.parts + (self.elements is not None))

    def prepare(self, arguments: Mapping[str, Tensor]) -> Coefficients:
        """Coefficients at some arguments.

        Raises:
            Handover: If a shape is so large that products with statistics would cancel.
        """
        form = self.family.natural
        assert form is not None and form.coefficients is not None
        wide = {name: a.to(torch.float64) for name, a in arguments.items()}
        if any(saddle_point.is_large(wide[name]) for name in form.shapes):
            raise Handover
        found = form.coefficients(wide, self.parts)
        found = found.reshape(found.shape[self.lead :]).expand(self.K, *self.shape, self.parts + 1)
        if self.elements is not None:
            return Coefficients(found.reshape(self.K, -1), found.new_zeros(self.K, 1))
        constant = found[..., -1].reshape(self.K, -1).sum(-1, keepdim=True)
        return Coefficients(found[..., :-1].reshape(self.K, -1), constant)

    def _statistics(self, rows: slice) -> Tensor:
        """T(x) of some rows. # (rows, *to_event, parts)"""
        return self.family.statistics(self.value[rows].to(torch.float64), {})["feature"]

    def features(self, rows: slice, p: Coefficients | None = None) -> Tensor:
        """T(x) of some rows, zero where a number is masked, and then which are not. # (P, rows)"""
        return self._features_of(rows) if self.stored is None else self.stored[:, rows]

    def _features_of(self, rows: slice) -> Tensor:
        found = self._statistics(rows)
        if self.elements is not None:
            seen = self.elements[rows] if len(self.elements) > 1 else self.elements
            seen = seen.unsqueeze(-1).expand(*found.shape[:-1], 1)
            found = torch.cat([torch.where(seen, found, 0.0), seen.to(found.dtype)], -1)
        return found.reshape(len(found), -1).T

    def log_density(self, p: Coefficients, features: Tensor, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, from their features, added to what is there. # (K, rows)"""
        constant = p.constant if onto is None else p.constant + onto.to(torch.float64)
        return torch.addmm(constant, p.linear, features)

    def moments(self, p: Coefficients, weights: Tensor, features: Tensor) -> Tensor:
        """Σ r T(x) of some rows. # (K, P)"""
        return weights.to(torch.float64) @ features.T

    def loop(self, p: Coefficients, constant: Tensor) -> tuple[Loop, int] | None:
        """See `pyro_em.densities.compiled.CompiledRows`."""
        if p.linear.numel() > _MANY:
            return None
        from pyro_em.densities.numba_rows import ONE, exponentials

        at = as_numbers((constant + p.constant).squeeze(-1)), as_numbers(p.linear)
        stored = None if self.stored is None else as_numbers(self.stored)

        def loop(rows: slice, often: Numbers | None, mass: Numbers, moments: Numbers) -> float:
            features, counts = stored, ONE if often is None else often
            if features is None:
                features = as_numbers(self._features_of(rows))
                counts = counts if often is None else counts[rows]
                rows = slice(0, features.shape[1])
            found: float = exponentials(features, counts, rows.start, rows.stop, *at, mass, moments)
            return found

        return loop, p.linear.shape[1]

    def statistics(
        self, p: Coefficients, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        found = moments.reshape(*(1,) * self.lead, self.K, *self.shape, -1)
        if self.elements is not None:
            return {"feature": found[..., :-1], "weight": found[..., -1]}
        weight = mass.reshape(self.K, *(1,) * len(self.shape)).expand(found.shape[self.lead : -1])
        return {"feature": found, "weight": weight.reshape(found.shape[:-1])}


def as_exponential(group: Group, K: int) -> Exponential | None:
    """The rule of sites in linear form whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
    """
    if group.family is None or group.family.natural is None or not group.observed:
        return None
    form = group.family.natural
    if form.of_counts or form.is_augmented or form.is_local:
        return None
    lead = 1 + group.n_plates
    value, rows = group.value, count_of_rows(group)
    if rows is None:
        return None
    inner = value.shape[lead + 1 :]
    shape = inner[: group.event_dims]
    elements = group.elements
    if elements is not None:
        if elements.shape[lead] != 1:
            return None
        elements = elements.expand(*value.shape[: lead + 1], *shape).reshape(rows, *shape)
    return Exponential(group.family, value.reshape(rows, *inner), elements, K, lead, tuple(shape))
