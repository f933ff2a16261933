"""The E-step of few rows that read Gaussian components alone: one product each way.

With the features Φ of the rows and the coefficients Θ of the components,

    ℓ = log π + h + Θ Φ,     R = softmax ℓ,     S = R Φᵀ,     Σ_n r_n,

and nothing else: where all of these lie is looked up once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.density import checked, scattered
from pyro_em.densities.features import Cells
from pyro_em.densities.gaussian import Gaussian, Prepared
from pyro_em.densities.theta import At, Theta
from pyro_em.posteriors.mixtures.labels import Labels
from pyro_em.posteriors.mixtures.responsibilities import sum_of_logs, unnormalised
from pyro_em.posteriors.mixtures.row_factors import RowFactors
from pyro_em.posteriors.quick import SumsBlock
from pyro_em.updates.expectations.statistics import NATURAL, Expectation

FEW_CELLS = 2**13


@dataclass(frozen=True, eq=False)
class FewRows:
    """Rows that are few enough for one product.

    Attributes:
        theta: The parameters of the steps.
        in_chunks: What takes the E-step where components are too narrow for products.
        g: The group of the rows.
        features: Φ. # (P, N)
        transposed: Φᵀ. # (N, P)
        columns: The elements of η that are log π. # (K,)
        in_order: Whether these are the first ones in order: all of η, where no other part has some.
        N: Rows.
        noise: How far rounding may carry the evidence, by the size of the largest term.
        labels: What is seen of the latent.
    """

    theta: Theta
    in_chunks: SumsBlock
    g: int
    features: Tensor
    transposed: Tensor
    columns: Tensor
    in_order: bool
    N: int
    noise: float
    labels: tuple[Labels, ...] = ()

    @classmethod
    def of(
        cls,
        factors: RowFactors,
        cells: Mapping[int, Cells],
        N: int,
        theta: Theta,
        in_chunks: SumsBlock,
    ) -> FewRows | None:
        """The rows of some factors, if that is all that they are.

        Args:
            factors: All factors that read rows; they read all latents of these.
            cells: All factors that read no row.
            N: Rows, which are held at once.
            theta: The parameters of the steps.
            in_chunks: The block that they are.
        """
        if factors.linear is not None or factors.others or factors.counted:
            return None
        if len(factors.normals) != 1 or len(cells) != 1:
            return None
        ((g, rule),), (table,) = factors.normals.items(), cells.values()
        if type(rule) is not Gaussian or rule.stored is None or not table.is_plain:
            return None
        if rule.x.dtype != torch.float64 and N * factors.K > FEW_CELLS:
            return None  # a chunk is quicker: its exponentials are kept from the smallest numbers
        in_order = table.is_in_order and len(table.columns) == factors.K
        noise = 2e-16 * N**0.5
        return cls(
            theta,
            in_chunks,
            g,
            rule.stored,
            rule.stored.T,
            table.columns,
            in_order,
            N,
            noise,
            factors.labels,
        )

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        p: Prepared = at.prepared[self.g]
        assert at.natural is not None
        eta = at.natural.eta
        if p.linear is None:
            return self.in_chunks.e_step(at)
        is_all = self.in_order and len(eta) == len(self.columns)
        log_pi = eta if is_all else eta.take(self.columns)
        constant = log_pi.unsqueeze(-1).to(p.constant.dtype) + p.constant
        joint = torch.addmm(constant, p.linear, self.features)
        for labels in self.labels:
            joint = labels.clamp(joint, slice(0, self.N))
        evidence, weights = responsibilities(joint)
        mass = weights.sum(1, dtype=torch.float64)
        moments = (weights @ self.transposed).to(torch.float64)
        if p.lost is not None:  # as `Gaussian.correction` says
            evidence = evidence + (moments * p.lost[0]).sum() + (mass * p.lost[1].squeeze(-1)).sum()
        log_evidence = checked(evidence, mass, self.N)
        features = mass if is_all else scattered(eta, self.columns, [mass])
        return Expectation(
            log_evidence,
            {NATURAL: {"features": features}, self.g: {"moments": moments, "mass": mass}},
            noise=self.noise * p.size,
        )


def responsibilities(joint: Tensor) -> tuple[Tensor, Tensor]:
    """The log evidence of all rows in nats, and R. # (), (K, rows)

    Of few rows an operation costs more than its numbers, and the largest responsibility of a row tells
    its evidence: log p = max ℓ − log max r.

    Args:
        joint: Log densities, which are overwritten. # (K, rows)
    """
    if joint.numel() <= FEW_CELLS:
        weights = joint.softmax(0)
        return joint.amax(0).to(torch.float64).sub_(weights.amax(0).log_()).sum(), weights
    top, weights, mass = unnormalised(joint, may_clamp=False)
    weights.div_(mass)
    return top.sum(dtype=torch.float64) + sum_of_logs(mass), weights
