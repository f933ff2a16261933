"""Draws of conjugate latents, from torch's generators of Gammas and Dirichlets."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import PriorKernel, matrix_of


def drawn(kernel: PriorKernel, chi: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw for each χ.

    Args:
        kernel: The form of the distribution.
        chi: # (*batch, P)
        generator: Source of randomness; torch's global state if None.

    Returns:
        # (*batch, *event)
    """
    if kernel.support == "positive":
        g = torch._standard_gamma(chi[..., 0].contiguous(), generator) / chi[..., 1]
        return g if kernel.power > 0 else g.reciprocal()
    if kernel.support == "matrix":
        return _matrices(chi, generator)
    simplex = torch._sample_dirichlet(chi, generator)
    return simplex if kernel.event_dim else simplex[..., 0]


def _matrices(chi: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of Wisharts: L A Aᵀ Lᵀ, with A triangular (Bartlett, 1933). # (..., D, D)"""
    inverse = matrix_of(chi)
    size = inverse.shape[-1]
    halves = (chi[..., :1] - torch.arange(size, device=chi.device)) / 2
    diagonal = (2 * torch._standard_gamma(halves.contiguous(), generator)).sqrt()
    noise = torch.randn(
        inverse.shape, generator=generator, dtype=inverse.dtype, device=inverse.device
    )
    # V = U⁻ᵀ U⁻¹ where V⁻¹ = U Uᵀ: any square root of V will do.
    factor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(inverse).mT, noise.tril(-1) + torch.diag_embed(diagonal), upper=True
    )
    return factor @ factor.mT
