"""To which elements of some plates the elements of a conjugate latent belong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugates.conjugate_cells import ElementsRead, rows_of
from pyro_em.posteriors.gaussians.gaussian import elements_in, is_within
from pyro_em.updates.expectations.conjugate_beliefs import slices_of


def elements_of_latent(
    groups: Sequence[Group], readings: Sequence[ElementsRead], count: int, plates: tuple[str, ...]
) -> tuple[Tensor, bool]:
    """For each element of the latent that of some plates to which it belongs, and whether it crosses.

    An element outside the plates belongs where those who read it are.

    Args:
        groups: The latent's site, then those that read it.
        readings: What each of the latter reads.
        count: How many elements the latent has.
        plates: Names of plates.

    Returns:
        # (elements,)
    """
    first = groups[0]
    device = first.value.device
    inside = is_within(first, plates)
    if inside:
        own = elements_in(first, plates).to(device)
        each = count // max(len(own), 1)
        low = own.contiguous() if each == 1 else own.repeat_interleave(each)
    else:
        low = torch.full((count,), torch.iinfo(torch.long).max, device=device)
    high: Tensor | None = None
    for group, reading in zip(groups[1:], readings, strict=True):
        if not is_within(group, plates):
            if not inside:
                return low.clamp(max=0), True
            continue
        if inside and reading.in_order and _shape(group) == _shape(first):
            continue  # each row reads the element that is in its place
        if high is None:
            high = low.clone() if inside else torch.full_like(low, -1)
        rows = rows_of(group.value.new_zeros(()), group, full=True).shape[0]
        own = elements_in(group, plates).to(device)
        each = rows // max(len(own), 1)  # numbers of an event, which are where their row is
        for part in slices_of(rows):
            inner = torch.arange(part.start, min(part.stop, rows), device=device)
            of = own[inner // max(each, 1)]
            for at in reading.elements.unbind(-1):
                here = at[part] if len(at) > 1 else at.expand(len(of))
                some = here >= 0
                low.scatter_reduce_(0, here[some], of[some], "amin")
                high.scatter_reduce_(0, here[some], of[some], "amax")
    if high is None:
        return low, False
    low = torch.where(high < 0, 0, low)
    return low, bool(((high >= 0) & (low != high)).any())


def _shape(group: Group) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The plates of a group with their sizes."""
    return group.dims[0][: group.n_plates], group.sizes[: group.n_plates]
