"""Rows of Student and Cauchy distributions: log densities, and expected precisions of each row.

With t = z² / ν, z = (x − μ) / σ, one logarithm of 1 + t serves both halves of the E-step:

    ℓ_k(x) = c_k − ½ (ν + 1) log(1 + t),      E[u] = (1 + 1/ν) / (1 + t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.densities.compiled import Loop, Numbers, as_numbers
from pyro_em.densities.single_rows import Chunk, SingleRows
from pyro_em.families.family import Statistics
from pyro_em.families.student import expected_logarithm, log_normaliser

_MOMENTS = 5


@dataclass(frozen=True, eq=False)
class Students:
    """Components at some arguments; each has a number for each of an event. # (numbers, K, 1)

    Attributes:
        df: ν.
        loc: μ.
        width: σ √ν.
        constant: The logarithm of the largest density.
        size: No term is expanded.
    """

    df: Tensor
    loc: Tensor
    width: Tensor
    constant: Tensor
    size: float = 0.0

    def part(self, cells: slice) -> Students:
        """Some of the components."""
        parts = (t[:, cells] for t in (self.df, self.loc, self.width, self.constant))
        return Students(*parts)


@dataclass(eq=False)
class StudentRows(SingleRows):
    """The rows of a group of Student sites; of each number z / √ν and log(1 + t) are kept."""

    family = "StudentT"

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.value.shape[1] * (1 + 2 * self.K)

    def prepare(self, arguments: Mapping[str, Tensor]) -> Students:
        """The components at some arguments."""
        df, loc, scale = (self.each(arguments, name) for name in ("df", "loc", "scale"))
        return Students(df, loc, scale * df.sqrt(), log_normaliser(df, scale))

    def log_density(self, p: Students, features: Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out = p.constant.sum(0) if features.seen is None else torch.zeros_like(p.constant[0])
        out = out if onto is None else out + onto.to(torch.float64)
        inverse = p.width.reciprocal()  # a product takes a third of a quotient's time
        for i, x in enumerate(features.value):
            z = (x - p.loc[i]).mul_(inverse[i])
            log = z.square().log1p_()
            features.kept.append((z, log))
            half = -0.5 * (p.df[i] + 1)
            if features.seen is None:
                out = torch.addcmul(out, log, half)
            else:
                out = out + torch.where(features.seen[i], half * log + p.constant[i], 0.0)
        return out

    def moments(self, p: Students, weights: Tensor, features: Chunk) -> Tensor:
        """Σ r, Σ q, Σ q z, Σ q z² and Σ r log(1 + t), q = r / (1 + t), z over √ν. # (K, numbers * 5)"""
        out, wide = [], weights.to(torch.float64)
        one = wide.new_ones(())
        for i, (z, log) in enumerate(features.kept):
            r = wide if features.seen is None else wide * features.seen[i]
            q = r / torch.addcmul(one, z, z)
            zeroth, rest = q.sum(-1), torch.linalg.vecdot(r, log)
            first = q.mul_(z).sum(-1)
            parts = (r.sum(-1), zeroth, first, torch.linalg.vecdot(q, z), rest)
            out.append(torch.stack(parts, -1))
        return torch.cat(out, -1)

    def loop(self, p: Students, constant: Tensor) -> tuple[Loop, int] | None:
        """See `pyro_em.densities.compiled.CompiledRows`."""
        if self.elements is not None:
            return None
        from pyro_em.densities.numba_rows import ONE, students

        x = np.ascontiguousarray(self.value.numpy())
        at = [
            as_numbers(t)
            for t in (
                (constant + p.constant.sum(0)).squeeze(-1),
                0.5 * (p.df.squeeze(-1) + 1),
                p.loc.squeeze(-1),
                p.width.squeeze(-1).reciprocal(),
            )
        ]
        numbers = self.value.shape[1]

        def loop(rows: slice, often: Numbers | None, mass: Numbers, moments: Numbers) -> float:
            sums = moments.reshape(self.K, numbers, _MOMENTS)
            counts = ONE if often is None else often
            found: float = students(x, counts, rows.start, rows.stop, *at, mass, sums)
            return found

        return loop, numbers * _MOMENTS

    def about(self, before: Students, now: Students, moments: Tensor, mass: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`; expected precisions stay as they were."""
        weight, zeroth, first, second, rest = self._plain(before, moments)
        step = (now.loc - before.loc).squeeze(-1).T
        second = second - 2 * step * first + step**2 * zeroth
        first = first - step * zeroth
        df, width = (t.squeeze(-1).T for t in (now.df, now.width))
        most = 1 + 1 / df
        logs = weight * (most.log() + expected_logarithm(df) + 1) - zeroth - rest
        scale = most * width
        parts = (weight, zeroth / most, first / scale, second / (scale * width), logs)
        return torch.stack(parts, -1).reshape(self.K, -1)

    def _plain(self, p: Students, moments: Tensor) -> tuple[Tensor, ...]:
        """Σ r, Σ r E[u], Σ r E[u] d, Σ r E[u] d² and Σ r (E[log u] − E[u] + 1). # (K, numbers) each"""
        found = moments.reshape(self.K, -1, _MOMENTS)
        df, width = (t.squeeze(-1).T for t in (p.df, p.width))
        weight, zeroth, first, second, logs = found.unbind(-1)
        most = 1 + 1 / df  # E[u] where t is zero
        zeroth = most * zeroth
        # log E[u] = log(1 + 1/ν) − log(1 + t)
        rest = weight * (most.log() + expected_logarithm(df) + 1) - logs - zeroth
        return weight, zeroth, most * width * first, most * width**2 * second, rest

    def statistics(
        self, p: Students, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        weight, zeroth, first, second, rest = self._plain(p, moments)
        feature = torch.stack([zeroth, first, second, rest], -1)
        return self.as_statistics(feature, weight)


@dataclass(eq=False)
class CauchyRows(StudentRows):
    """The rows of a group of Cauchy sites: one degree of freedom."""

    family = "Cauchy"

    def prepare(self, arguments: Mapping[str, Tensor]) -> Students:
        """The components at some arguments."""
        loc, scale = self.each(arguments, "loc"), self.each(arguments, "scale")
        return self._prepared(loc, scale, -math.log(math.pi))

    def _prepared(self, loc: Tensor, scale: Tensor, constant: float) -> Students:
        return Students(torch.ones_like(scale), loc, scale, constant - scale.log())

    def statistics(
        self, p: Students, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        weight, zeroth, first, second, _ = self._plain(p, moments)
        return self.as_statistics(torch.stack([zeroth, first, second], -1), weight)


@dataclass(eq=False)
class HalfCauchyRows(CauchyRows):
    """The rows of a group of HalfCauchy sites: a location of zero, and twice the density."""

    family = "HalfCauchy"

    def prepare(self, arguments: Mapping[str, Tensor]) -> Students:
        """The components at some arguments."""
        scale = self.each(arguments, "scale")
        return self._prepared(torch.zeros_like(scale), scale, math.log(2 / math.pi))

    def statistics(
        self, p: Students, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        weight, _, _, second, _ = self._plain(p, moments)
        return self.as_statistics(second.unsqueeze(-1), weight)
