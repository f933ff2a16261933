"""How often each sequence of a chain counts: ``poutine.scale`` around its plate."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role


def sequence_weights(graph: FactorGraph) -> Tensor | Finding | None:
    """How often each sequence counts; None where each counts once.

    A weight multiplies the log evidence of a sequence, as if it were there so many times.

    Args:
        graph: A graph whose latents are all in the same plates.

    Returns:
        The weights # (B,), or why there are none that all sites of a sequence share.
    """
    groups = [g for g in graph.groups if g.role is not Role.POINT]
    if all(group.is_unscaled for group in groups):
        return None
    plates = next(iter(graph.latents.values())).plates
    sizes = tuple(graph.dim_size(p) for p in plates)
    found: Tensor | None = None
    for group in groups:
        for scale in group.scales:
            own = torch.as_tensor(scale, dtype=torch.float64, device=group.value.device).detach()
            is_whole = group.dims[0][: group.n_plates] == plates
            rest = own.shape[group.n_plates :] if own.dim() else ()
            if own.dim() and (not is_whole or any(n != 1 for n in rest)):
                return _refused(group.members[0])
            own = own.reshape(own.shape[: group.n_plates]).expand(sizes).reshape(-1)
            if not is_whole or (found is not None and not torch.equal(found, own)):
                return _refused(group.members[0])
            found = own
    return found


def _refused(site: str) -> Finding:
    what = f"'{site}' has a weight (poutine.scale) of its own: no kernel"
    return Finding(f"site '{site}'", what)
