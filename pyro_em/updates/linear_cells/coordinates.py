"""All elements of some parameters as one vector without bounds.

    θ = u,    low + eᵘ,    high − e⁻ᵘ,    low + (high − low) / (1 + e⁻ᵘ)

as the constraint of a parameter has no bound, one below, one above, or both. A row of a simplex is the
softmax of as many numbers, which a shift of all does not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.distributions import bounds, is_simplex
from pyro_em.tracing.parameters import TracedParameter

_TINY = 1e-290


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where the elements of each parameter are.

    Attributes:
        slices: Per parameter its elements.
        intervals: Per parameter where its elements lie.
        size: Of the vector.
        rows: Of parameters on a simplex how many elements a row has.
    """

    slices: Mapping[str, slice]
    intervals: Mapping[str, tuple[float, float]]
    size: int
    rows: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: Sequence[TracedParameter]) -> Coordinates:
        """The coordinates of some parameters whose constraints are intervals, or simplexes."""
        slices, intervals, rows, begin = {}, {}, {}, 0
        for p in parameters:
            end = begin + p.leaf.numel()
            slices[p.name] = slice(begin, end)
            interval = bounds(p.constraint)
            if interval is None:
                assert is_simplex(p.constraint)
                interval, rows[p.name] = (0.0, 1.0), p.leaf.shape[-1]
            intervals[p.name] = interval
            begin = end
        return cls(slices, intervals, begin, rows)

    def enter(self, values: Mapping[str, Tensor]) -> Tensor:
        """u at parameter values. # (size,)"""
        return torch.cat([self._inverse(n, values[n].reshape(-1)) for n in self.slices])

    def _inverse(self, name: str, value: Tensor) -> Tensor:
        low, high = self.intervals[name]
        if name in self.rows:
            return value.clamp(min=_TINY).log()
        if low > -math.inf and high < math.inf:
            return (value - low).clamp(min=_TINY).log() - (high - value).clamp(min=_TINY).log()
        if low > -math.inf:
            return (value - low).clamp(min=_TINY).log()
        return -(high - value).clamp(min=_TINY).log() if high < math.inf else value

    def forward(self, name: str, u: Tensor) -> Tensor:
        """Elements of a parameter at coordinates of their own; of a simplex whole rows."""
        low, high = self.intervals[name]
        if name in self.rows:
            return u.reshape(-1, self.rows[name]).softmax(-1).reshape(u.shape)
        if low > -math.inf and high < math.inf:
            return low + (high - low) * u.sigmoid()
        if low > -math.inf:
            return low + u.exp()
        return high - (-u).exp() if high < math.inf else u

    def jet(self, name: str, u: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Elements of a parameter with their first and second derivatives in their coordinates."""
        low, high = self.intervals[name]
        if low > -math.inf and high < math.inf:
            share = u.sigmoid()
            slope = (high - low) * share * (1 - share)
            return low + (high - low) * share, slope, slope * (1 - 2 * share)
        if low > -math.inf:
            e = u.exp()
            return low + e, e, e
        if high < math.inf:
            e = (-u).exp()
            return high - e, e, -e
        return u, 1.0, 0.0

    def values(self, u: Tensor) -> dict[str, Tensor]:
        """All elements of each parameter. # (numel,) each"""
        return {name: self.forward(name, u[own]) for name, own in self.slices.items()}

    def name_of(self, place: int) -> tuple[str, int]:
        """The parameter of a coordinate, and the element's flat index."""
        found = next(n for n, own in self.slices.items() if place < own.stop)
        return found, place - self.slices[found].start
