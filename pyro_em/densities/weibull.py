"""Rows of Weibull distributions: log densities, and sums about the shapes that they were taken at.

One exponential of t = k log(x / λ) serves both halves of the E-step:

    ℓ_k(x) = log k + t − exp t − log x,      Σ r exp(t) t^j / j!
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.compiled import Loop, Numbers, as_numbers
from pyro_em.densities.single_rows import Chunk, SingleRows
from pyro_em.families.family import Statistics
from pyro_em.families.weibull import FARTHEST, LAST

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

    def part(self, cells: slice) -> Weibulls:
        """Some of the components."""
        return Weibulls(*(t[:, cells] for t in (self.shape, self.shift, self.constant)))


@dataclass(eq=False)
class WeibullRows(SingleRows):
    """The rows of a group of Weibull sites, log x; of each number t and exp t are kept."""

    family = "Weibull"
    is_local = True

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.value.shape[1] * (1 + 3 * self.K)

    @classmethod
    def read(cls, value: Tensor) -> Tensor:
        """Their logarithms. # (rows, numbers)"""
        return value.to(torch.float64).log()

    def prepare(self, arguments: Mapping[str, Tensor]) -> Weibulls:
        """The components at some arguments."""
        shape, scale = self.each(arguments, "concentration"), self.each(arguments, "scale")
        return Weibulls(shape, -shape * scale.log(), shape.log())

    def log_density(self, p: Weibulls, features: Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out = p.constant.new_zeros(self.K, 1) if onto is None else onto.to(torch.float64)
        for i, y in enumerate(features.value):
            t = torch.addcmul(p.shift[i], p.shape[i], y)
            e = t.exp()
            features.kept.append((t, e))
            own = t - e + (p.constant[i] - y)
            out = out + (own if features.seen is None else torch.where(features.seen[i], own, 0.0))
        return out

    def moments(self, p: Weibulls, weights: Tensor, features: Chunk) -> Tensor:
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

        y = as_numbers(self.value)
        at = [as_numbers(t.squeeze(-1)) for t in (constant + p.constant.sum(0), p.shape, p.shift)]
        numbers = self.value.shape[1]

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
        return self.as_statistics(feature, found[..., 0])
