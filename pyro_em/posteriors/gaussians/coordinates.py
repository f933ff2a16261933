"""Vectors of which some coordinates were not seen, below Gaussian latents.

With o the coordinates that were seen and m the others, y = C u + r, r ~ N(0, R), the density of y_o
has the rows C_o and the matrix R_oo. Those of m stand apart: rows of zero, and the identity. What the
M-step needs of complete vectors follows from the seen residuals,

    r̂ = G r_o,   G = (I, R_mo R_oo⁻¹),     Cov(r_m | r_o) = R_mm − R_mo R_oo⁻¹ R_om.

Source: Little and Rubin (2002), section 11.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.graph.factors import Group, is_incomplete
from pyro_em.updates.expectations.gaussian_rows import cells_of, rows_of, tril_rows
from pyro_em.updates.expectations.linear_moments import LinearMoments


def seen_coordinates(group: Group) -> Tensor | None:
    """Which coordinates of each row were seen; None where all were. # (rows, D)"""
    return ~rows_of(group, group.value)[0].isnan() if is_incomplete(group) else None


def apart(tril: Tensor, seen: Tensor) -> Tensor:
    """The factor of a covariance in which unseen coordinates stand apart.

    Args:
        tril: L. # (…, D, D)
        seen: # (…, D)

    Returns:
        # (…, D, D)
    """
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device)
    return torch.linalg.cholesky(torch.where(both, tril @ tril.mT, eye))


def completed(moments: LinearMoments, tril: Tensor, seen: Tensor) -> LinearMoments:
    """Moments of complete residuals from those of what was seen.

    Args:
        moments: Of each row; zero where not seen.
        tril: L, with R = L Lᵀ, of the E-step. # (cells|1, rows|1, D, D)
        seen: # (rows, D)
    """
    R = tril @ tril.mT
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse = torch.cholesky_inverse(apart(tril, seen)) * both
    G = torch.where(seen.unsqueeze(-1), eye, (R * seen.unsqueeze(-2)) @ inverse)
    unseen = ~seen.unsqueeze(-1) & ~seen.unsqueeze(-2)
    left = torch.where(unseen, R - G @ R, torch.zeros_like(R))
    second = G @ moments.r_r @ G.mT + (left + left.mT) / 2
    return replace(moments, r_phi=G @ moments.r_phi, r_r=second)


def with_seen_alone(
    group: Group, arguments: Mapping[str, Tensor], seen: Tensor
) -> dict[str, Tensor]:
    """The arguments of a site in which unseen coordinates stand apart.

    Args:
        group: The site.
        arguments: Its arguments.
        seen: # (rows, D)
    """
    out = {}
    for name in group.lines:
        tail = 0 if name == "loc" else 1
        rows = rows_of(group, arguments[name], tail).to(torch.float64)
        there = seen if name == "loc" else seen.unsqueeze(-1)
        whole = torch.where(there, rows, torch.zeros_like(rows))
        out[name] = cells_of(group, _over_cells(group, whole), tail)
    tril = apart(tril_rows(group, arguments), seen)
    out["scale_tril"] = cells_of(group, _over_cells(group, tril), 1)
    return out


def _over_cells(group: Group, rows: Tensor) -> Tensor:
    """Rows for every discrete cell. # (cells, rows, …)"""
    cells = torch.Size(group.sizes[group.n_plates :]).numel()
    return rows.expand(cells, *rows.shape[1:])
