"""Rows of Weibull distributions: log densities, and sums about the shapes that they were taken at.

One exponential of t = k log(x / λ) serves both halves of the E-step:

    ℓ_k(x) = log k + t − exp t − log x,      Σ r exp(t) t^j / j!
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.densities.compiled import Loop, Numbers, as_numbers
from pyro_em.densities.density import PlainRows
from pyro_em.densities.single_rows import single_rows
from pyro_em.families.family import Statistics
from pyro_em.families.weibull import FARTHEST, LAST
from pyro_em.graph.factors import Group

_MOMENTS = LAST + 3


@dataclass(frozen=True, eq=False)
class Weibulls:
    """Components at some arguments; each has a number for each of an event. # (numbers, K, 1)

    Attributes:
        shape: k.
        shift: −k log λ.
        constant: log k.
        size: No term is expanded.
    """

    shape: Tensor
    shift: Tensor
    constant: Tensor
    size: float = 0.0


@dataclass(eq=False)
class _Chunk:
    """Some rows, and what both halves of an E-step need of them.

    Attributes:
        y: log x. # (numbers, rows)
        seen: Which numbers count; None where all do. # (numbers, rows)
        kept: t and exp t of each number. # (K, rows) each
    """

    y: Tensor
    seen: Tensor | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class WeibullRows(PlainRows):
    """The rows of a group of Weibull sites with component-wise arguments.

    Attributes:
        logarithm: log x. # (rows, numbers)
        elements: Which of them count, where some are masked. # (rows or 1, numbers)
        K: Components.
        lead: Dimensions of the group before the component's: members and plates.
        shape: The ``to_event`` dimensions of a datum.
    """

    is_local = True

    logarithm: Tensor
    elements: Tensor | None
    K: int
    lead: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.logarithm.shape[1] * (1 + 3 * self.K)

    def prepare(self, arguments: Mapping[str, Tensor]) -> Weibulls:
        """The components at some arguments."""

        def each(name: str) -> Tensor:
            t = arguments[name].to(torch.float64)
            t = t.reshape(t.shape[self.lead :]).expand(self.K, *self.shape)
            return t.reshape(self.K, -1).T.unsqueeze(-1)

        shape, scale = each("concentration"), each("scale")
        return Weibulls(shape, -shape * scale.log(), shape.log())

    def features(self, rows: slice, p: Weibulls | None = None) -> _Chunk:
        """Some rows."""
        seen = self.elements
        if seen is not None:
            seen = (seen[rows] if len(seen) > 1 else seen).T
        return _Chunk(self.logarithm[rows].T.contiguous(), seen)

    def log_density(self, p: Weibulls, features: _Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out = p.constant.new_zeros(self.K, 1) if onto is None else onto.to(torch.float64)
        for i, y in enumerate(features.y):
            t = torch.addcmul(p.shift[i], p.shape[i], y)
            e = t.exp()
            features.kept.append((t, e))
            own = t - e + (p.constant[i] - y)
            out = out + (own if features.seen is None else torch.where(features.seen[i], own, 0.0))
        return out

    def moments(self, p: Weibulls, weights: Tensor, features: _Chunk) -> Tensor:
        """Σ r, Σ r t and Σ r exp(t) t^j / j!. # (K, numbers * (LAST + 3))"""
        out, wide = [], weights.to(torch.float64)
        for i, (t, e) in enumerate(features.kept):
            r = wide if features.seen is None else wide * features.seen[i]
            near = t.clamp(-FARTHEST, FARTHEST)
            own = r * e.clamp(max=math.exp(FARTHEST))
            sums = [r.sum(-1), torch.linalg.vecdot(r, t), own.sum(-1)]
            for j in range(1, LAST + 1):
                own.mul_(near)
                sums.append(own.sum(-1) / math.factorial(j))
            out.append(torch.stack(sums, -1))
        return torch.cat(out, -1)

    def loop(self, p: Weibulls, constant: Tensor) -> tuple[Loop, int] | None:
        """See `pyro_em.densities.compiled.CompiledRows`."""
        if self.elements is not None:
            return None
        from pyro_em.densities.numba_rows import ONE, weibulls

        y = as_numbers(self.logarithm)
        at = [as_numbers(t.squeeze(-1)) for t in (constant + p.constant.sum(0), p.shape, p.shift)]
        numbers = self.logarithm.shape[1]

        def loop(rows: slice, often: Numbers | None, mass: Numbers, moments: Numbers) -> float:
            sums = moments.reshape(self.K, numbers, _MOMENTS)
            counts = ONE if often is None else often
            found: float = weibulls(y, counts, rows.start, rows.stop, *at, mass, sums)
            return found

        return loop, numbers * _MOMENTS

    def statistics(
        self, p: Weibulls, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        found = moments.reshape(self.K, -1, _MOMENTS)
        logs = found[..., 1] / p.shape.squeeze(-1).T
        feature = torch.cat([logs.unsqueeze(-1), found[..., 2:]], -1)
        lead = (1,) * self.lead
        return {
            "feature": feature.reshape(*lead, self.K, *self.shape, -1),
            "weight": found[..., 0].reshape(*lead, self.K, *self.shape),
        }


def as_weibull(group: Group, K: int) -> WeibullRows | None:
    """The rule of Weibull sites whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
    """
    found = single_rows(group, "Weibull")
    if found is None:
        return None
    logarithm = found.value.to(torch.float64).log()
    return WeibullRows(logarithm, found.elements, K, found.lead, found.shape)
