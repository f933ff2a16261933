"""To which elements of some plates the elements of a conjugate latent belong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugate_cells import Reading, rows_of
from pyro_em.posteriors.gaussian import elements_in, is_within


def elements_of_latent(
    groups: Sequence[Group], readings: Sequence[Reading], count: int, plates: tuple[str, ...]
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
    crossing = torch.zeros((), dtype=torch.bool, device=device)
    if is_within(first, plates):
        own = elements_in(first, plates).to(device)
        low = own.repeat_interleave(count // max(len(own), 1))
        high = low
    else:
        low = torch.full((count,), torch.iinfo(torch.long).max, device=device)
        high = torch.full((count,), -1, device=device)
    for group, reading in zip(groups[1:], readings, strict=True):
        if not is_within(group, plates):
            if not is_within(first, plates):
                return low.clamp(max=0), True
            continue
        rows = rows_of(group.value.new_zeros(()), group, full=True).shape[0]
        own = elements_in(group, plates).to(device)
        own = own.repeat_interleave(rows // max(len(own), 1))
        for at in reading.elements.unbind(-1):
            at = at.expand(rows)
            some = at >= 0
            low = low.scatter_reduce(0, at[some], own[some], "amin")
            high = high.scatter_reduce(0, at[some], own[some], "amax")
    low = torch.where(high < 0, 0, low)
    crossing = (high >= 0) & (low != high)
    return low, bool(crossing.any())
