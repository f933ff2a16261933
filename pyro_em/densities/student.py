"""Rows of Student distributions: log densities, and expected precisions beside responsibilities.

With t = z² / ν, z = (x − μ) / σ, one logarithm of 1 + t serves both halves of the E-step:

    ℓ_k(x) = c_k − ½ (ν + 1) log(1 + t),      E[u] = (1 + 1/ν) / (1 + t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyro_em.densities.compiled import Loop, Numbers, as_numbers
from pyro_em.densities.density import PlainRows
from pyro_em.densities.single_rows import single_rows
from pyro_em.families.family import Statistics
from pyro_em.families.student import expected_logarithm, log_normaliser
from pyro_em.graph.factors import Group

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


@dataclass(eq=False)
class _Chunk:
    """Some rows, and what both halves of an E-step need of them.

    Attributes:
        x: # (numbers, rows)
        seen: Which numbers count; None where all do. # (numbers, rows)
        kept: z / √ν and log(1 + t) of each number. # (K, rows) each
    """

    x: Tensor
    seen: Tensor | None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class StudentRows(PlainRows):
    """The rows of a group of Student sites with component-wise arguments.

    Attributes:
        value: The data. # (rows, numbers)
        elements: Which of them count, where some are masked. # (rows or 1, numbers)
        K: Components.
        lead: Dimensions of the group before the component's: members and plates.
        shape: The ``to_event`` dimensions of a datum.
    """

    value: Tensor
    elements: Tensor | None
    K: int
    lead: int
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.value.shape[1] * (1 + 2 * self.K)

    def prepare(self, arguments: Mapping[str, Tensor]) -> Students:
        """The components at some arguments."""

        def each(name: str) -> Tensor:
            t = arguments[name].to(torch.float64)
            t = t.reshape(t.shape[self.lead :]).expand(self.K, *self.shape)
            return t.reshape(self.K, -1).T.unsqueeze(-1)

        df, loc, scale = each("df"), each("loc"), each("scale")
        return Students(df, loc, scale * df.sqrt(), log_normaliser(df, scale))

    def features(self, rows: slice, p: Students | None = None) -> _Chunk:
        """Some rows."""
        seen = self.elements
        if seen is not None:
            seen = (seen[rows] if len(seen) > 1 else seen).T
        return _Chunk(self.value[rows].to(torch.float64).T.contiguous(), seen)

    def log_density(self, p: Students, features: _Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        out = p.constant.sum(0) if features.seen is None else p.constant.new_zeros(self.K, 1)
        out = out if onto is None else out + onto.to(torch.float64)
        inverse = p.width.reciprocal()  # a product takes a third of a quotient's time
        for i, x in enumerate(features.x):
            z = (x - p.loc[i]).mul_(inverse[i])
            log = z.square().log1p_()
            features.kept.append((z, log))
            half = -0.5 * (p.df[i] + 1)
            if features.seen is None:
                out = torch.addcmul(out, log, half)
            else:
                out = out + torch.where(features.seen[i], half * log + p.constant[i], 0.0)
        return out

    def moments(self, p: Students, weights: Tensor, features: _Chunk) -> Tensor:
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
        lead = (1,) * self.lead
        return {
            "feature": feature.reshape(*lead, self.K, *self.shape, 4),
            "weight": weight.reshape(*lead, self.K, *self.shape),
        }


def as_student(group: Group, K: int) -> StudentRows | None:
    """The rule of Student sites whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
    """
    found = single_rows(group, "StudentT")
    if found is None:
        return None
    return StudentRows(found.value, found.elements, K, found.lead, found.shape)
