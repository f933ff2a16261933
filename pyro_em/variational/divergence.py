"""Kullback–Leibler divergences of a guide's factors in closed form, where Pyro knows one.

    KL(q ‖ p) = E_q[log q(h | x) − log p(h)],

which takes the place of the two drawn terms of a latent h, and lowers the variance of the bound.

Source: Kingma and Welling (2014), "Auto-encoding variational Bayes", the second estimator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_em.distributions import unwrap
from pyro_em.graph.structure import Structure
from pyro_em.tracing.sites import Role
from pyro_em.variational.pair import Routing
from pyro_em.variational.particle import is_reparameterised
from pyro_em.variational.summands import Summand


def minus_kl(name: str, prior: Mapping[str, Any], drawn: Mapping[str, Any]) -> Summand:
    """−KL(q ‖ p) of one latent as a summand of the bound.

    Args:
        name: The latent.
        prior: Its site in the model.
        drawn: Its site in the guide.
    """
    p, q, n = prior["fn"], drawn["fn"], 0
    if type(p) is dist.Independent and type(q) is dist.Independent:
        n = p.reinterpreted_batch_ndims
        if n == q.reinterpreted_batch_ndims and not p.base_dist.event_shape:
            p, q = p.base_dist, q.base_dist
        else:
            n = 0
    scale = prior["scale"]
    is_whole = prior["mask"] is None and not isinstance(scale, Tensor) and scale == 1.0
    kl = kl_divergence(q, p)
    if not is_whole:
        kl = kl.flatten(-n).sum(-1) if n else kl
        kl, n = scale_and_mask(kl, scale, prior["mask"]), 0
    return Summand(f"kl:{name}", Role.SAMPLED, prior, kl, n, -1)


def with_analytic_kl(routing: Routing, structure: Structure) -> frozenset[str]:
    """Drawn latents whose KL divergence to their prior has a closed form and is valid.

    The prior's parents must not be drawn from a guide site that depends on the latent.
    """
    guide = routing.guide
    if guide is None or routing.solved or routing.enumerated:
        return frozenset()
    known = set()
    for name in routing.drawn:
        site = guide.sites.get(name)
        info = structure.sites.get(name)
        if site is None or info is None or name not in structure.unobserved:
            continue
        parents = {p for p in info.scope if p != name}
        if any(name in guide.scopes.get(p, frozenset()) for p in parents):
            continue
        prior = structure.unobserved[name]
        if is_reparameterised(site) and _counts_alike(site, prior) and _has_kl(site, prior):
            known.add(name)
    return frozenset(known)


def _counts_alike(q: Mapping[str, Any], p: Mapping[str, Any]) -> bool:
    """Whether guide and model scale and mask a site in the same way."""
    if q["mask"] is not None or p["mask"] is not None:
        return False
    return bool((torch.as_tensor(q["scale"]) == torch.as_tensor(p["scale"])).all())


def _has_kl(q: Mapping[str, Any], p: Mapping[str, Any]) -> bool:
    if type(unwrap(q["fn"])[0]) is dist.Delta:  # its log_density is no part of that formula
        return False
    try:
        with torch.no_grad():
            kl = kl_divergence(q["fn"], p["fn"])
            # Infinite for a Normal guide of a positive latent: its draws may still all be positive.
            return kl.shape == q["fn"].batch_shape and bool(torch.isfinite(kl).all())
    except NotImplementedError:  # torch's registry knows no formula
        return False
