"""Draws of parameters from the normal distribution that an estimate has when data are many.

    u ~ N(û, C_u),    C_u = P cov(θ̂) Pᵀ,    P = (∂θ/∂u)⁺,

in Pyro's unconstrained coordinates u, so that every draw θ(u) lies within its constraint. The
pseudo-inverse leaves directions alone along which θ does not move (a softmax has one).

Source: van der Vaart (1998), "Asymptotic Statistics", section 5.3; the delta method.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.fitting.results.derivatives import jacobian_of
from pyro_em.fitting.results.labels import ParameterForm
from pyro_em.fitting.results.standard_errors import StandardErrors


def asymptotic_draws(
    params: Mapping[str, Tensor],
    forms: Mapping[str, ParameterForm],
    errors: StandardErrors,
    n: int,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Draws of all parameters together.

    Args:
        params: The estimates, constrained.
        forms: Their constraints.
        errors: Their standard errors and covariance.
        n: Number of draws.
        seed: Of the draws; torch's global state otherwise.

    Returns:
        By name; a parameter without standard errors, or with some elements on a boundary or not
        identified, is at its estimate in every draw. # (n, *shape)
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    free = [m for m in errors if not bool(torch.isnan(errors[m]).any())]
    places, begin = {}, 0
    for name in errors:
        places[name] = range(begin, begin + errors[name].numel())
        begin += errors[name].numel()
    drawn = {m: v.expand(n, *v.shape).clone() for m, v in params.items()}
    if not free:
        return drawn
    centres, inverses = [], []
    for name in free:
        transform = transform_to(forms[name].constraint)
        theta = params[name].detach().double().cpu()
        u = transform.inv(theta).detach().requires_grad_()
        with torch.enable_grad():
            inverses.append(torch.linalg.pinv(jacobian_of([transform(u)], [u])))
        centres.append(u.detach())
    chosen = torch.tensor([i for name in free for i in places[name]])
    covariance = errors.covariance.double().cpu()[chosen][:, chosen]
    back = torch.block_diag(*inverses)
    values, vectors = torch.linalg.eigh(back @ covariance @ back.mT)
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(n, len(values), generator=generator, dtype=torch.float64) @ root.mT
    parts = noise.split([u.numel() for u in centres], -1)
    for name, u, part in zip(free, centres, parts, strict=True):
        moved = u + part.reshape(n, *u.shape)
        drawn[name] = transform_to(forms[name].constraint)(moved).to(params[name])
    return drawn
