"""Whether sites read conjugate latents as was found, held against the numbers of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.compact import compact
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, refused
from pyro_em.graph.layout import FactorLayout
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import mask_tensor, tensors_of

_MANY = 1 << 16  # numbers that are compared at a time


def require_as_predicted(
    name: str,
    read: ConjugateRead | None,
    runs: tuple[Run, Run],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    layout: FactorLayout,
    kernels: Mapping[str, PriorKernel],
) -> None:
    """Hold the numbers of a site in two runs against what it reads.

    Raises:
        NotConjugate: If they differ otherwise.
    """
    here, there = (run.sites[name] for run in runs)
    is_latent = name in values[0]
    fixed = _numbers_of(here, read, is_latent), _numbers_of(there, read, is_latent)
    alike = len(fixed[0]) == len(fixed[1]) and all(map(_is_equal, *fixed))
    if alike and read is not None:
        alike = _is_as_read(name, read, (here, there), values, layout, kernels[read.latent])
    if not alike:
        latent = next(iter(values[0])) if read is None else read.latent
        what = f"it changes with '{latent}' in a way that autograd does not show."
        raise refused(latent, f"site '{name}'", what)


def _is_as_read(
    name: str,
    read: ConjugateRead,
    sites: tuple[Mapping[str, Any], Mapping[str, Any]],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    layout: FactorLayout,
    kernel: PriorKernel,
) -> bool:
    """Whether an argument in two runs follows from the values of its latent."""
    found = []
    for site, own in zip(sites, values, strict=True):
        base, reinterpreted, _ = unwrap(site["fn"])
        family = family_of(site["fn"])
        assert family is not None
        tensor = given_arguments(base, family)[read.pair.argument]
        event = reinterpreted + family.argument_dims.get(read.pair.argument, 0)
        dims = layout.place(name)[1]
        a = compact(tensor.detach(), event, dims, reinterpreted, tensor)
        if read.pair.argument == "logits":
            a = a.sigmoid() if kernel.support == "unit" else a.softmax(-1)
        value = own[read.latent].detach()
        value = value.reshape(-1, *value.shape[value.dim() - kernel.event_dim :])
        reads = read.elements >= 0
        chosen = value[read.elements.clamp(min=0)].to(a)
        if kernel.support == "matrix":
            factor = a[..., :1, :1] / chosen[..., :1, :1]
            rest = a - factor * chosen
            found.append((torch.stack([rest, factor.expand_as(rest)]), a))
        elif kernel.event_dim:
            if read.order is not None:
                chosen = chosen.gather(-1, read.order.expand(chosen.shape))
            found.append((a - chosen, torch.zeros_like(a)))
        else:
            if read.order is not None:
                chosen = torch.where(read.order[..., 0] > 0, 1 - chosen, chosen)
            deep = a.dim() - reads.dim()  # the entries of a matrix read one element
            if deep:
                reads, chosen = (t.reshape(*t.shape, *(1,) * deep) for t in (reads, chosen))
            chosen = chosen**read.power
            found.append((torch.where(reads, a / chosen, a), a))
        del chosen
    (one, _), (two, _) = found
    if one.shape != two.shape:
        return False
    # What is a covariance times a positive number is one at every number.
    sure = kernel.event_dim > 0 or one.dim() > read.elements.dim()
    positive = sure or bool((one[(read.elements >= 0).expand_as(one)] > 0).all())
    eps = 1e3 * torch.finfo(one.dtype).eps
    how = {"rtol": eps, "atol": eps * kernel.event_dim}
    pairs = zip(one.reshape(-1).split(_MANY), two.reshape(-1).split(_MANY), strict=True)
    return positive and all(bool(torch.isclose(u, v, **how).all()) for u, v in pairs)


def _numbers_of(
    site: Mapping[str, Any], read: ConjugateRead | None, is_latent: bool
) -> list[Tensor]:
    """The numbers in the density of a site, without the argument that reads a latent."""
    fn = site["fn"]
    family = family_of(fn)
    if read is not None and family is not None:
        arguments = given_arguments(unwrap(fn)[0], family)
        out = [t for a, t in arguments.items() if a != read.pair.argument]
    else:
        out = tensors_of(fn)
    value = site["value"] if site["is_observed"] and not is_latent else None
    rest = (value, site["scale"], mask_tensor(site))
    return [t for t in (*out, *rest) if isinstance(t, Tensor)]


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
