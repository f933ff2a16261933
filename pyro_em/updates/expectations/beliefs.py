"""What an M-step knows of a site that reads Gaussian latents: second moments in place of values.

With φ = (u, 1) for the unknowns u that a row reads, and r = y − (C, b) φ at the E-step, any other
coefficients give E[(r − Δφ)(r − Δφ)ᵀ] from E[r rᵀ], E[r φᵀ] and E[φ φᵀ]: the expected log density is
exact for all parameters, as log N is quadratic in u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.updates.expectations.gaussian_rows import (
    cells_of,
    coefficient_rows,
    is_matrix,
    rows_of,
    tril_rows,
    weights_of,
)
from pyro_em.updates.expectations.linear_moments import LinearMoments, shifted
from pyro_em.updates.expectations.noiseless import precision_of


@dataclass(frozen=True, eq=False)
class Moments:
    """Posterior moments of one site's residuals and of the unknowns in its mean.

    Attributes:
        moments: Of each row, for each state of the discrete latents.
        coefficients: (C, b) at the E-step. # (cells or 1, rows or 1, D, Q + 1)
        weights: How much each row, or each entry, counts: posterior probabilities of the states
            included. # (cells or 1, rows) or (cells or 1, rows, D)
        constant: Nats that the log density of each row has besides. # (rows,) or (cells or 1, rows)
    """

    moments: LinearMoments
    coefficients: Tensor
    weights: Tensor
    constant: Tensor | None = None

    def change(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """Δ, the coefficients less those of the E-step. # (cells or 1, rows or 1, D, Q + 1)"""
        return coefficient_rows(group, arguments) - self.coefficients

    def residuals(self, group: Group, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """E[r] and E[r rᵀ], or its diagonal, at other coefficients.

        Returns:
            # (cells, rows, D), (cells, rows, D, D) or (cells, rows, D)
        """
        delta, m = self.change(group, arguments), self.moments
        shift = (delta @ m.phi_phi[..., -1:]).squeeze(-1)
        return m.r_phi[..., -1] - shift, shifted(m, delta)

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """See `pyro_em.graph.factors.Belief`."""
        _, second = self.residuals(group, arguments)
        if is_matrix(group):
            tril = tril_rows(group, arguments)
            precision = precision_of(group, arguments)
            distance = (precision * second).sum((-2, -1))
            log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            constant = tril.shape[-1] * math.log(2 * math.pi)
            log_p = -0.5 * (distance + constant) - log_det
            if self.constant is not None:
                log_p = log_p + self.constant
            return log_p.transpose(0, 1).reshape(len(group.members), *group.sizes)
        scale = rows_of(group, arguments["scale"]).to(torch.float64)
        log_p = -0.5 * (second / scale.square() + math.log(2 * math.pi)) - scale.log()
        if group.elements is not None:
            log_p = torch.where(weights_of(group) > 0, log_p, 0.0)
        log_p = log_p.sum(-1)
        if self.constant is not None:
            log_p = log_p + self.constant
        return log_p.transpose(0, 1).reshape(len(group.members), *group.sizes)

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `pyro_em.graph.factors.Belief`."""
        first, second = self.residuals(group, arguments)
        tail = 1 if is_matrix(group) else 0
        return {"deviation": cells_of(group, first), "square": cells_of(group, second, tail)}


def mean_sums(group: Group) -> tuple[Tensor, Tensor]:
    """Of a Gaussian latent the sum of its posterior means, weighed as they count. # (q,), ()

    Args:
        group: The latent's own site, whose offset is zero.
    """
    belief = group.belief
    assert isinstance(belief, Moments)
    mean, _ = belief.residuals(group, group.arguments)
    weights = belief.weights.expand(mean.shape[:2]).unsqueeze(-1)
    return (weights * mean).sum((0, 1)), weights.sum()
