"""Second moments of linear-Gaussian sites for the M-step, about the E-step's point.

A row's residual at the E-step's parameters is r = y − b − C u, for the Q unknowns u that it reads. With
φ = (u, 1) and new coefficients (C, b) + Δ the residual is r − Δφ, so that

    E[(r − Δφ)(r − Δφ)ᵀ] = E[r rᵀ] − Δ E[φ rᵀ] − E[r φᵀ] Δᵀ + Δ E[φ φᵀ] Δᵀ.

Nothing here is of the size of the data: offsets of a million cost no digits, which raw moments
E[y φᵀ] would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, cat, ones_like


@dataclass(frozen=True, eq=False)
class LinearMoments:
    """Posterior second moments of residuals and unknowns of one site.

    Of one row each, or, without that dimension, weighted sums over rows.

    Attributes:
        phi_phi: E[φ φᵀ]. # (cells, rows, Q + 1, Q + 1); sums whose weights differ between the entries
            of a row: (cells, D, Q + 1, Q + 1)
        r_phi: E[r φᵀ]. # (cells, rows, D, Q + 1)
        r_r: E[r rᵀ] or its diagonal. # (cells, rows, D, D) or (cells, rows, D)
        diagonal: Whether `r_r` is the diagonal only.
        count: Of sums: the sum of the weights. # (cells, 1) or, of each entry, (cells, D)
    """

    phi_phi: Tensor
    r_phi: Tensor
    r_r: Tensor
    diagonal: bool
    count: Tensor | None = None


def linear_moments(
    mean: Tensor,
    covariance: Tensor,
    residual: Tensor,
    cross: Tensor,
    second: Tensor,
    diagonal: bool,
) -> LinearMoments:
    """Moments of (r, φ) from those of the residuals r and the unknowns u.

    Args:
        mean: E[u]. # (cells, rows, Q)
        covariance: Cov(u). # (cells, rows, Q, Q)
        residual: E[r]. # (cells, rows, D)
        cross: Cov(r, u). # (cells, rows, D, Q)
        second: E[r rᵀ] or its diagonal. # (cells, rows, D, D) or (cells, rows, D)
        diagonal: Whether `second` is the diagonal only.
    """
    phi = cat([mean, ones_like(mean[..., :1] if mean.shape[-1] else residual[..., :1])], -1)
    phi_phi = phi.unsqueeze(-1) * phi.unsqueeze(-2)
    phi_phi[..., :-1, :-1] += covariance
    r_u = cross + residual.unsqueeze(-1) * mean.unsqueeze(-2)
    return LinearMoments(
        phi_phi,
        cat([r_u, residual.unsqueeze(-1)], -1),
        second,
        diagonal,
    )


def summed(moments: LinearMoments, weights: Tensor | None = None) -> LinearMoments:
    """Sums over rows, of each cell.

    Args:
        moments: Of one row each.
        weights: How much each row counts; the weights of single entries need diagonal moments.
            # (cells|1, rows|1), or (cells|1, rows|1, D)

    Raises:
        ValueError: If entries are weighted but the moments are those of whole rows.
    """
    phi_phi, r_phi, r_r = moments.phi_phi, moments.r_phi, moments.r_r
    if weights is None:
        weights = ones_like(phi_phi[:1, :, 0, 0])
    weights = weights.to(phi_phi)
    cells, rows = phi_phi.shape[:2]
    if weights.dim() == 2:
        weights = weights.expand(cells, rows)
        return LinearMoments(
            _over_rows(weights, phi_phi),
            _over_rows(weights, r_phi),
            _over_rows(weights, r_r),
            moments.diagonal,
            weights.sum(1, keepdim=True),
        )
    if not moments.diagonal:
        raise ValueError("Weights of single entries need moments with diagonal=True.")
    D, P = r_phi.shape[-2:]
    weights = weights.expand(cells, rows, D)
    by_entry = weights.transpose(1, 2) @ phi_phi.reshape(cells, rows, P * P)
    return LinearMoments(
        by_entry.reshape(cells, D, P, P),
        (weights.unsqueeze(-1) * r_phi).sum(1),
        (weights * r_r).sum(1),
        True,
        weights.sum(1),
    )


def shifted(moments: LinearMoments, delta: Tensor) -> Tensor:
    """E[(r − Δφ)(r − Δφ)ᵀ], or its diagonal: the residuals at coefficients moved by Δ.

    Args:
        moments: Of one row each, or sums.
        delta: Δ, the change of (C, b). # (cells|1, rows|1, D, Q + 1); for sums (cells|1, D, Q + 1)

    Returns:
        # (cells, rows, D, D) or (cells, rows, D); of sums without rows

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        >>> m = linear_moments(2 * one, one[..., None], zero, zero[..., None], one, diagonal=True)
        >>> shifted(m, torch.tensor([[[[0.0, 3.0]]]])).item()  # an offset larger by 3: 1 + 3²
        10.0
    """
    if moments.diagonal:
        phi_phi = moments.phi_phi
        if phi_phi.dim() == moments.r_phi.dim():
            quadratic = ((delta @ phi_phi) * delta).sum(-1)
        else:  # each entry of the rows has sums of its own
            quadratic = ((delta.unsqueeze(-2) @ phi_phi).squeeze(-2) * delta).sum(-1)
        return moments.r_r - 2 * (delta * moments.r_phi).sum(-1) + quadratic
    cross = moments.r_phi @ delta.mT
    return moments.r_r - cross - cross.mT + delta @ moments.phi_phi @ delta.mT


def _over_rows(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_rows w x as a product, which keeps no weighted copy. # (cells, ...)"""
    cells, rows = x.shape[:2]
    flat = x.reshape(cells, rows, math.prod(x.shape[2:]))
    return (weights.unsqueeze(-2) @ flat).squeeze(-2).reshape(cells, *x.shape[2:])
