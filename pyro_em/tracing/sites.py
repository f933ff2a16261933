"""What a traced site is: its role, its tensors, its plates, its mask."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import Enum
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro.ops.provenance import get_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import split_mask


class Role(Enum):
    """What a site of a model paired with its guide stands for."""

    DATA = "data"  # observed by the user
    LATENT = "latent"  # to be summed
    POINT = "point"  # a latent of the model at a point estimate: its density is a log prior
    SAMPLED = "sampled"  # a latent of the model at a value that the guide drew
    GUIDE = "guide"  # a site of the guide whose value was drawn
    GAUSSIAN = "gaussian"  # a latent of the model that is integrated: its value here is zero
    CONJUGATE = (
        "conjugate"  # the same of a rate, a probability, a simplex: its value here is a unit
    )


# Latents of the model that are integrated by blocks.
INTEGRATED = frozenset({Role.GAUSSIAN, Role.CONJUGATE})

ROLE = "_pyro_em_role"


def role_of(site: Mapping[str, Any]) -> Role:
    """The role of a traced site."""
    marked = site["infer"].get(ROLE)
    if marked is not None:
        return Role(marked)
    return Role.DATA if site["is_observed"] else Role.LATENT


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a traced site is an unobserved random choice that no guide drew."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
        and role_of(site) is Role.LATENT
    )


def is_auxiliary(site: Mapping[str, Any]) -> bool:
    """Whether a guide marks a site as one that the model lacks."""
    return bool(site["infer"].get("is_auxiliary", False))


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a traced site contributes a density: latents, observations, ``pyro.factor``."""
    if site["type"] != "sample" or site_is_subsample(site):
        return False
    return not site["infer"].get("_deterministic", False)


def factors_in(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sites of a trace that contribute a density (`is_factor`)."""
    return {name: site for name, site in sites.items() if is_factor(site)}


def latents_in(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The unobserved random choices of a trace that no guide drew (`is_latent`)."""
    return {name: site for name, site in sites.items() if is_latent(site)}


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a traced site holds the indices of a plate."""
    return site["type"] == "sample" and site_is_subsample(site)


def roles_in(sites: Mapping[str, dict[str, Any]]) -> dict[str, Role]:
    """The role of each site of a trace that contributes a density."""
    return {name: role_of(site) for name, site in sites.items() if is_factor(site)}


def subsamples_in(sites: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sites of a trace that hold the indices of a plate (`is_subsample`)."""
    return {name: site for name, site in sites.items() if is_subsample(site)}


def users(model: Any) -> Any:
    """The user's own function or module, without what this library put around it."""
    while hasattr(model, "users_model"):
        model = model.users_model
    return model


def signature_of(model: Any) -> list[inspect.Parameter]:
    """The parameters of a model or guide; empty where they cannot be known."""
    model = users(model)
    target = model.forward if isinstance(model, torch.nn.Module) else model
    if type(target) is FunctionType and not vars(target) and not target.__kwdefaults__:
        form = (target.__code__, target.__defaults__)
        known = _signatures.get(target)
        if known is None or known[0] is not form[0] or known[1] is not form[1]:
            known = _signatures[target] = (
                *form,
                list(inspect.signature(target).parameters.values()),
            )
        return list(known[2])
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return []


# Of plain functions, with the code and the defaults that they are of.
_signatures: WeakKeyDictionary[FunctionType, tuple[Any, Any, list[inspect.Parameter]]]
_signatures = WeakKeyDictionary()


def tensors_of(fn: Any) -> list[torch.Tensor]:
    """Every tensor that a distribution object holds, through its wrappers."""
    found: list[torch.Tensor] = []
    for item in vars(fn).values():
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, torch.distributions.Distribution):
            found += tensors_of(item)
        elif isinstance(item, (list, tuple)):
            for part in item:
                if isinstance(part, torch.Tensor):
                    found.append(part)
                elif isinstance(part, torch.distributions.Distribution) or hasattr(part, "inv"):
                    found += tensors_of(part)
    return found


def tensors_of_each(fns: Sequence[Any]) -> list[list[torch.Tensor]]:
    """Every tensor that each of some distributions holds (`tensors_of`)."""
    return [tensors_of(fn) for fn in fns]


def support_reads_latents(fn: Any) -> bool:
    """Whether the support of a distribution from a provenance run differs between latents' values."""
    try:
        return _has_tags(fn.support)
    except (NotImplementedError, AttributeError):
        return False


def _has_tags(constraint: Any) -> bool:
    held = list(vars(constraint).values())
    parts = [p for v in held for p in (v if isinstance(v, (list, tuple)) else (v,))]
    return any(
        _has_tags(p) if isinstance(p, constraints.Constraint) else bool(get_provenance(p))
        for p in parts
    )


def mask_tensor(site: Mapping[str, Any]) -> Tensor | bool | None:
    """Where a site counts, at least in part: its mask and those of its distribution's wrappers."""
    return split_mask(site["fn"], site["mask"])[0]


def frames_of(site: Mapping[str, Any]) -> dict[str, Any]:
    """The vectorised plate frames of a traced site, left to right."""
    frames = [f for f in site["cond_indep_stack"] if f.dim is not None]
    if len(frames) > 1:
        frames.sort(key=lambda f: f.dim)
    return {f.name: f for f in frames}


def frames_in(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The vectorised plate frames of each site (`frames_of`)."""
    return {name: frames_of(s) if s["cond_indep_stack"] else {} for name, s in sites.items()}
