"""Distributions inside wrappers: ``to_event``, ``expand`` and ``mask``, in any order.

A mask that is below ``to_event`` leaves out single elements of an event:

    Normal(mu, 1).mask(seen).to_event(1)      log p = Σ_d seen_d log N(x_d | mu_d, 1)

so that all masks of a site are held over the batch of the innermost distribution, which has the
site's batch dimensions and, on their right, those that ``to_event`` took into the event.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor

Mask: TypeAlias = Tensor | bool | None


def unwrap(fn: Any) -> tuple[Any, int, list[tuple[Any, int]]]:
    """Strip Independent, Expanded and Masked from a distribution.

    Returns:
        The base distribution, the number of its batch dimensions that are event dimensions of
        ``fn``, and the masks of the stripped wrappers, each with how many of its rightmost
        dimensions are event dimensions of ``fn``.
    """
    reinterpreted: int = 0
    masks: list[tuple[Any, int]] = []
    while True:
        if isinstance(fn, torch.distributions.Independent):
            reinterpreted += fn.reinterpreted_batch_ndims
        elif isinstance(fn, dist.torch_distribution.MaskedDistribution):
            masks.append((fn._mask, reinterpreted))
        elif not isinstance(fn, dist.torch_distribution.ExpandedDistribution):
            return fn, reinterpreted, masks
        fn = fn.base_dist


def element_mask(fn: Any, site_mask: Mask = None) -> Mask:
    """Where each element of an event counts: all masks of a site together.

    Args:
        fn: The site's distribution.
        site_mask: The mask of the site itself (``poutine.mask``).

    Returns:
        None where nothing is masked. # (*batch, *reinterpreted dims), or 1s

    Example:
        >>> seen = torch.tensor([True, False, True])
        >>> element_mask(dist.Normal(torch.zeros(2, 3), 1.0).mask(seen).to_event(1)).tolist()
        [[True, False, True]]
    """
    _, reinterpreted, masks = unwrap(fn)
    out: Mask = None
    narrow = [(unexpanded(m), outer) for m, outer in masks]
    for mask, outer in ((site_mask, 0), *narrow):
        if mask is None or mask is True:
            continue
        if mask is not False:
            mask = mask.reshape(mask.shape + (1,) * (reinterpreted - outer))
        out = mask if out is None else out & mask
    return out


def split_mask(fn: Any, site_mask: Mask = None) -> tuple[Mask, Tensor | None]:
    """Where an event counts at all, and which of its elements do, where they differ.

    Returns:
        # (*batch) or 1s; (*batch, *reinterpreted dims) or 1s, None where whole events are masked
    """
    mask, reinterpreted = element_mask(fn, site_mask), unwrap(fn)[1]
    if not isinstance(mask, Tensor) or not reinterpreted:
        return mask, None
    lead = mask.dim() - reinterpreted
    if mask.shape[lead:].numel() == 1:
        return mask.reshape(mask.shape[:lead]), None
    return mask.flatten(lead).any(-1), mask


def unexpanded(mask: Any) -> Any:
    """A tensor without its copies: a wrapper expands its mask to the batch of what it masks."""
    if not isinstance(mask, Tensor):
        return mask
    for d in range(mask.dim()):
        if mask.stride(d) == 0 and mask.shape[d] > 1:
            mask = mask.narrow(d, 0, 1)
    return mask
