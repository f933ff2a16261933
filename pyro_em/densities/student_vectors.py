"""Rows of Student vectors: the Gaussian rows of their matrices, and expected precisions beside them.

With ℓ_k the log density of a Gaussian component and h_k its largest value, δ² = 2 (h − ℓ) is the
squared distance, and

    log t_k(x) = c_k − ½ (ν + D) log(1 + δ² / ν),      E[u] = (ν + D) / (ν + δ²),

so that both products are those of `pyro_em.densities.gaussian`, whose rows weigh r E[u].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.gaussian import Gaussian, GaussianForm, Prepared
from pyro_em.densities.plain_rows import count_of_rows
from pyro_em.families.family import Statistics
from pyro_em.families.student_vectors import expected_logarithm, log_normaliser
from pyro_em.graph.all_data import AllData
from pyro_em.graph.factors import Group

_OWN = 3  # sums in front of those of the Gaussian rows


@dataclass(frozen=True, eq=False)
class StudentVectors:
    """Components at some arguments.

    Attributes:
        gaussian: The Gaussian components with the same matrices.
        df: ν. # (K, 1)
        constant: c. # (K, 1)
        largest: h. # (K, 1)
    """

    gaussian: Prepared
    df: Tensor
    constant: Tensor
    largest: Tensor

    @property
    def size(self) -> float:
        """The largest term that the Gaussian components expand."""
        return self.gaussian.size

    def part(self, cells: slice) -> StudentVectors:
        """Some of the components."""
        own = (t[cells] for t in (self.df, self.constant, self.largest))
        return StudentVectors(self.gaussian.part(cells), *own)


@dataclass(eq=False)
class Chunk:
    """Some rows, and what both halves of an E-step need of them.

    Attributes:
        features: Those of the Gaussian rows.
        logs: log(1 + δ² / ν), once log densities are known. # (K, rows)
    """

    features: Tensor
    logs: Tensor | None = None


@dataclass(eq=False)
class StudentVectorRows:
    """The rows of a group of Student vectors with component-wise arguments.

    Attributes:
        gaussian: The rows as Gaussian ones.
    """

    gaussian: Gaussian
    is_local = False

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        return self.gaussian.width + 3 * self.gaussian.K

    @property
    def D(self) -> int:
        """How many numbers a vector has."""
        return self.gaussian.x.shape[0]

    def prepare(self, arguments: Mapping[str, Tensor]) -> StudentVectors:
        """The components at some arguments."""
        found, K = self.gaussian.prepare(arguments), self.gaussian.K
        tril = arguments["scale_tril"].to(torch.float64).reshape(-1, self.D, self.D)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True).expand(K, 1)
        df = arguments["df"].to(torch.float64).reshape(-1, 1).expand(K, 1)
        largest = -(log_det + 0.5 * self.D * math.log(2 * math.pi))
        return StudentVectors(found, df, log_normaliser(df, log_det, self.D), largest)

    def features(self, rows: slice, p: StudentVectors) -> Chunk:
        """Some rows."""
        return Chunk(self.gaussian.features(rows, p.gaussian))

    def log_density(self, p: StudentVectors, features: Chunk, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        found = self.gaussian.log_density(p.gaussian, features.features).to(torch.float64)
        distance = torch.rsub(found, p.largest).clamp_(min=0)
        features.logs = distance.mul_(2 / p.df).log1p_()
        constant = p.constant if onto is None else p.constant + onto.to(torch.float64)
        return torch.addcmul(constant, features.logs, -0.5 * (p.df + self.D))

    def moments(self, p: StudentVectors, weights: Tensor, features: Chunk) -> Tensor:
        """Σ r, Σ q, Σ r log(1 + δ²/ν) and what Gaussian rows that weigh q say, q = r / (1 + δ²/ν).

        # (K, 3 + P); those of whitened rows one behind the other, see `over_rows`
        """
        assert features.logs is not None
        wide = weights.to(torch.float64)
        each = wide * features.logs.neg().exp_()
        own = (wide.sum(-1), each.sum(-1), torch.linalg.vecdot(wide, features.logs))
        rest = self.gaussian.moments(p.gaussian, each, features.features)
        if p.gaussian.white is None:
            return torch.cat([torch.stack(own, -1), rest], -1)
        return torch.cat([torch.stack(own, -1).reshape(-1), rest])

    def over_rows(self, p: StudentVectors, moments: Tensor) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`. # (K, 3 + P)"""
        if p.gaussian.white is None:
            return moments
        own, rest = moments.tensor_split([self.gaussian.K * _OWN])
        rest = self.gaussian.over_rows(p.gaussian, rest)
        return torch.cat([own.reshape(self.gaussian.K, _OWN), rest], -1)

    def about(
        self, before: StudentVectors, now: StudentVectors, moments: Tensor, mass: Tensor
    ) -> Tensor:
        """See `pyro_em.densities.density.NormalRows`; expected precisions stay as they were."""
        weight, q, rests = self._plain(before, moments)
        rest = self.gaussian.about(before.gaussian, now.gaussian, moments[:, _OWN:], moments[:, 1])
        most, least = ((p.df + self.D).squeeze(-1) / p.df.squeeze(-1) for p in (before, now))
        df = now.df.squeeze(-1)
        rest = rest * (most / least).unsqueeze(-1)
        back = weight * (least.log() + expected_logarithm(df, self.D) + 1) - q - rests
        own = torch.stack([weight, q / least, back], -1)
        return torch.cat([own, rest], -1)

    def correction(self, p: StudentVectors, moments: Tensor, mass: Tensor) -> Tensor | float:
        """What rounded coefficients cost the log evidence, to first order, in nats.

        A log density changes by E[u] times what that of the Gaussian component does.
        """
        if p.gaussian.white is not None:
            return 0.0
        each = (p.df + self.D) / p.df
        weighed = moments[:, _OWN:] * each, moments[:, 1] * each.squeeze(-1)
        return self.gaussian.correction(p.gaussian, *weighed)

    def _plain(self, p: StudentVectors, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Σ r, Σ r E[u] and Σ r (E[log u] − E[u] + 1). # (K,) each"""
        weight, zeroth, logs = moments[:, :_OWN].unbind(-1)
        df = p.df.squeeze(-1)
        most = (df + self.D) / df  # E[u] where the distance is zero
        q = most * zeroth
        return weight, q, weight * (most.log() + expected_logarithm(df, self.D) + 1) - logs - q

    def statistics(
        self, p: StudentVectors, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics."""
        weight, q, rest = self._plain(p, moments)
        most = (p.df + self.D) / p.df
        found = self.gaussian.statistics(p.gaussian, moments[:, _OWN:] * most, q, arguments)
        lead = (1,) * self.gaussian.lead
        return {
            "deviation": found["deviation"],
            "square": found["square"],
            "precision": found["weight"],
            "weight": weight.reshape(*lead, -1),
            "feature": rest.reshape(*lead, -1, 1),
        }


def as_student_vectors(
    group: Group, K: int, all_data: AllData | None = None
) -> StudentVectorRows | None:
    """The rule of Student vectors whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
        all_data: What is known of all data, where the group holds a part of them.
    """
    if group.family is None or group.family.name != "MultivariateStudentT":
        return None
    lead = 1 + group.n_plates
    is_plain = group.observed and group.elements is None and not group.event_dims
    if not is_plain or count_of_rows(group) is None or group.value.dim() != lead + 2:
        return None
    centre = None if all_data is None else all_data.centres.get(group.members[0])
    return StudentVectorRows(
        GaussianForm(False, "scale_tril", K, False, lead).on(group.value, centre)
    )
