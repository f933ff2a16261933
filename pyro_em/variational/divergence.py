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
from torch.distributions import kl_divergence

from pyro_em.distributions import unwrap
from pyro_em.graph.structure import Structure
from pyro_em.tracing.sites import Role
from pyro_em.variational.pair import Routing
from pyro_em.variational.particle import Term, dims_of, is_reparameterised


def kl_term(name: str, prior: Mapping[str, Any], drawn: Mapping[str, Any]) -> Term:
    """−KL(q ‖ p) of one latent as a term of the bound.

    Args:
        name: The latent.
        prior: Its site in the model.
        drawn: Its site in the guide.
    """
    kl = kl_divergence(drawn["fn"], prior["fn"])
    kl = scale_and_mask(kl, prior["scale"], prior["mask"])
    return Term(f"kl:{name}", Role.SAMPLED, dims_of(prior, kl), -kl)


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
