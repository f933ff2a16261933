"""Discrete latents that are observed in part, as latents of all rows with a factor where they are seen.

``pyro.sample("z", d, obs=labels, obs_mask=seen)`` is three sites: ``z_observed`` and ``z_unobserved``,
each masked where the other counts, and ``z``, their values put together. Enumerated, that value is
the label in all cells of a row that is seen: whatever reads it has numbers for each value *and* row.
Here ``z`` is the value of ``z_unobserved``, which counts in all rows, and ``z_observed`` is what
tells them apart, 1[z = label] (`pyro_em.clamped`): the same density, read by the values alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.clamped import Clamped
from pyro_em.distributions import Mask, element_mask, has_finite_support
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.provenance import tags_of
from pyro_em.tracing.sites import tensors_of

Sites = Mapping[str, Mapping[str, Any]]


def may_be_clamped(names: Iterable[str], latents: Collection[str], tagged: Sites) -> list[str]:
    """Which ``obs_mask`` sites are summed latents whose labels and mask read no latent.

    Args:
        names: The sites with ``obs_mask``, as users call them.
        latents: The latents that are summed.
        tagged: The sites of a run with tagged values.
    """
    out = []
    for name in names:
        site, hidden = tagged[f"{name}_observed"], f"{name}_unobserved"
        if hidden not in latents or not has_finite_support(site["fn"]):
            continue
        read = [t for t in (site["value"], site["mask"]) if isinstance(t, Tensor)]
        if not set().union(*map(tags_of, read)) & set(latents):
            out.append(name)
    return out


def with_clamps(sites: dict[str, dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """The sites of an enumerated run, with what is seen of some latents as factors.

    Args:
        sites: The sites with a density.
        names: The latents, as users call them.
    """
    out = dict(sites)
    for name in names:
        seen, hidden = sites[f"{name}_observed"], sites[f"{name}_unobserved"]
        infer = hidden["infer"]
        dim, value = infer["_enumerate_dim"], hidden["value"]
        size = value.shape[dim - hidden["fn"].event_dim]
        like = next((t for t in tensors_of(seen["fn"]) if t.is_floating_point()), None)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        places = torch.arange(size, dtype=dtype, device=value.device)
        mask = element_mask(seen["fn"], seen["mask"])
        ids = {**seen["infer"].get("_dim_to_id", {}), dim: infer["_dim_to_id"][dim]}
        out[f"{name}_observed"] = {
            **seen,
            "fn": Clamped(places.reshape(-1, *(1,) * (-1 - dim)), validate_args=False),
            "value": _places(seen, hidden, size, mask),
            "mask": mask,
            "infer": {**seen["infer"], "_dim_to_id": ids},
        }
        out[f"{name}_unobserved"] = {**hidden, "mask": _either(seen["mask"], hidden["mask"])}
    return out


def with_labels(sites: Sites, names: Iterable[str]) -> Sites:
    """The sites of a plain run, with latents at their labels where they are seen, as what reads them.

    Args:
        sites: The sites with a density.
        names: The latents, as users call them.
    """
    changed = {}
    for name in names:
        seen, hidden = sites[f"{name}_observed"], sites[f"{name}_unobserved"]
        label: Tensor = getattr(seen["value"], "_t", seen["value"])
        value: Tensor = getattr(hidden["value"], "_t", hidden["value"])
        mask = torch.as_tensor(True if seen["mask"] is None else seen["mask"])
        mask = mask.reshape(mask.shape + (1,) * hidden["fn"].event_dim)
        value = torch.where(mask, label.to(value.dtype), value)
        changed[f"{name}_unobserved"] = {**hidden, "value": value}
    return {**sites, **changed} if changed else sites


def places_of_labels(graph: FactorGraph, name: str) -> Tensor | None:
    """Where the labels of a latent are in its support; None where it is not clamped.

    Where none is seen they are anything.

    Args:
        graph: The factor graph.
        name: The latent, as users call it.

    Returns:
        # (*plates of its factor or 1s)
    """
    if name not in graph.structure.clamped:
        return None
    group, i = graph.group_of(f"{name}_observed")
    value = group.value[i]
    return value.reshape(value.shape[: group.n_plates]).long()


def _places(seen: Mapping[str, Any], hidden: Mapping[str, Any], size: int, mask: Mask) -> Tensor:
    """Where labels are in the support, anything where they do not count. # (*batch or 1s)

    Integers that are places stay as they were given, in the same memory.
    """
    label, support = seen["value"].detach(), hidden["value"].detach()
    event = hidden["fn"].event_dim
    dim = hidden["infer"]["_enumerate_dim"]
    for d in range(-support.dim(), -event):
        if d != dim - event:
            support = support.narrow(d, 0, 1)
    support = support.reshape(size, *support.shape[support.dim() - event :])
    in_order = not event and torch.equal(support.long(), torch.arange(size, device=label.device))
    if not in_order:
        same = label.unsqueeze(label.dim() - event) == support.to(label.dtype)
        hit = same.flatten(same.dim() - event).all(-1) if event else same
        label = torch.where(hit.any(-1), hit.to(torch.uint8).argmax(-1), -1)
    if not label.is_floating_point() or mask is None or mask is True:
        return label
    zero = label.new_zeros(())  # NaN stands for many labels that are not seen
    return torch.where(torch.as_tensor(mask, device=label.device), label, zero)


def _either(a: Mask, b: Mask) -> Mask:
    """Where one of two masks counts; None where that is everywhere."""
    if a is None or a is True or b is None or b is True:
        return None
    if a is False or b is False:
        return b if a is False else a
    both = a | b
    return None if bool(both.all()) else both
