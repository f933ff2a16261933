"""Factors of the rows of a plate that read the same of a row's latents: log densities, and sums back.

    ℓ_f(x_n, z) for all cells z of the latents that they read,     S_f = Σ_n Σ_z r_n(z) T_f(x_n)

with r_n(z) the posterior of these latents alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.density import KeepsRows, NormalRows
from pyro_em.densities.row_features import RowFeatures
from pyro_em.densities.theta import At
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.mixtures.labels import Labels
from pyro_em.posteriors.mixtures.rows import restricted
from pyro_em.updates.expectations.statistics import group_sums

_MANY = 2**22  # probabilities that are kept from which on they are kept in single precision


class Collected(dict[int | str, Tensor]):
    """Sums over chunks, and what is kept of every row.

    Args:
        N: How many rows there are.
    """

    def __init__(self, N: int) -> None:
        super().__init__()
        self.N = N
        self.statistics: dict[int | str, Statistics] = {}

    def add(self, key: int | str, part: Tensor) -> None:
        """Add a part."""
        self[key] = self[key] + part if key in self else part

    def keep(self, key: int | str, part: Tensor, rows: slice) -> None:
        """Put probabilities of some rows where they belong. # (K, rows)

        Many are kept in single precision: each is rounded by 6e-8 of itself, and all of them by chance,
        so that a sum over N rows is off by 6e-8 / √N of itself. The evidence does not read them.
        """
        if key not in self:
            many = len(part) * self.N > _MANY
            dtype = torch.float32 if many else torch.float64
            self[key] = torch.empty(len(part), self.N, dtype=dtype, device=part.device)
        self[key][:, rows] = part

    def add_statistics(self, g: int, part: Statistics) -> None:
        """Add the statistics of a group's rows."""
        part = {name: s.to(torch.float64) for name, s in part.items()}
        before = self.statistics.get(g)
        self.statistics[g] = (
            part if before is None else {name: before[name] + s for name, s in part.items()}
        )


@dataclass(frozen=True, eq=False)
class AtRows:
    """What both halves of an E-step need of some rows.

    Attributes:
        rows: Which.
        features: Per Normal group.
        parts: The other groups at these rows.
    """

    rows: slice
    features: Mapping[int, Any]
    parts: Mapping[int, Group]


@dataclass(frozen=True, eq=False)
class RowFactors:
    """Groups of a collapsed graph whose rows read the same latents.

    Attributes:
        reads: The latents that they read, by number.
        K: How many values these have together.
        linear: All linear groups, as one; None where there are none.
        normals: Normal groups that are evaluated by matrix products.
        others: Groups that are evaluated by their family.
        counted: Which rows of a Normal group count, where some are masked. # (N,)
        labels: What is seen of the latents.
    """

    reads: tuple[int, ...]
    K: int
    linear: RowFeatures | None
    normals: Mapping[int, NormalRows]
    others: tuple[int, ...]
    counted: Mapping[int, Tensor]
    labels: tuple[Labels, ...] = ()

    def width(self, graph: FactorGraph) -> int:
        """Numbers per row that a chunk holds."""
        members = sum(len(graph.groups[g].members) for g in self.others)
        return self.K * (2 + members) + sum(g.width for g in self.normals.values())

    def at(self, graph: FactorGraph, at: At, rows: slice) -> AtRows:
        """Some rows."""
        features = {g: rule.features(rows, at.prepared[g]) for g, rule in self.normals.items()}
        return AtRows(rows, features, {g: restricted(graph.groups[g], rows) for g in self.others})

    def log_density(
        self,
        at: At,
        theta: tuple[Tensor, Tensor | None] | None,
        here: AtRows,
        onto: Tensor | None,
    ) -> Tensor:
        """Log densities, added to what is there. # (K, rows)

        Args:
            at: Parameters.
            theta: See `RowFeatures.thetas`; None without linear groups.
            here: The rows.
            onto: # (K, rows or 1)
        """
        joint = onto
        if self.linear is not None:
            assert theta is not None
            own, fixed = theta
            if fixed is not None:
                joint = fixed if joint is None else joint + fixed
            phi = self.linear.phi[:, here.rows]
            joint = own @ phi if joint is None else torch.addmm(joint, own, phi)
        for g, rule in self.normals.items():
            if g not in self.counted:
                joint = rule.log_density(at.prepared[g], here.features[g], joint)
                continue
            table = rule.log_density(at.prepared[g], here.features[g])
            table = torch.where(self.counted[g][here.rows], table, 0.0)
            joint = table if joint is None else joint + table
        for g, part in here.parts.items():
            table = part.log_density(at.arguments[g])
            table = table.reshape(len(part.members), -1, self.K).sum(0).T
            joint = table if joint is None else joint + table
        if self.labels:
            # Else its memory is this chunk's own.
            if joint is None or joint is onto or joint.shape[1] < here.rows.stop - here.rows.start:
                joint = self._own(joint, here.rows)
            for labels in self.labels:
                joint = labels.clamp(joint, here.rows)
        assert joint is not None
        return joint

    def _own(self, onto: Tensor | None, rows: slice) -> Tensor:
        """What is there, for each of some rows. # (K, rows)"""
        size = self.K, rows.stop - rows.start
        if onto is None:
            device = self.labels[0].places.device
            return torch.zeros(size, dtype=torch.float64, device=device)
        return onto.expand(size).clone()

    def collect(self, at: At, weights: Tensor, here: AtRows, sums: Collected, number: int) -> None:
        """Add the sums of some rows.

        Args:
            at: Parameters.
            weights: Posterior probabilities, counted as often as rows are. # (K, rows)
            here: The rows.
            sums: What is collected.
            number: That of these factors.
        """
        if self.linear is not None:
            wide = weights if weights.dtype == torch.float64 else weights.double()
            sums.add(f"linear {number}", wide @ self.linear.phi[:, here.rows].T)
        for g, rule in self.normals.items():
            own = weights
            if g in self.counted:
                own = weights * self.counted[g][here.rows]
                sums.add(f"mass of {g}", own.sum(1, dtype=torch.float64))
            moments = rule.moments(at.prepared[g], own, here.features[g])
            if isinstance(rule, KeepsRows):
                sums.keep(g, moments, here.rows)
            else:
                sums.add(g, moments)
        for g, part in here.parts.items():
            counts = weights.T.reshape(1, *part.sizes).expand(len(part.members), *part.sizes)
            sums.add_statistics(g, group_sums(part, counts, at.arguments[g]))
