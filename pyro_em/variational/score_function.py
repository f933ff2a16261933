"""The score-function estimator: draws that cannot be reparameterised, with baselines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_em.graph.structure import Structure
from pyro_em.tracing.handlers import GuideSites
from pyro_em.variational.pair import Routing
from pyro_em.variational.particle import Term


def _onto(value: Tensor, dims: Sequence[str], score: Term, kept: Sequence[str]) -> Tensor:
    """Sum a term over plates that are not kept, and lay it out over the drawn site's plates."""
    shared = [d for d in dims if d and d in kept]
    axes = [i for i, d in enumerate(dims) if d not in shared]
    value = value.sum(axes) if axes else value
    order = [shared.index(d) for d in score.dims if d in shared]
    value = value.permute(order) if order else value
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if d in shared else 1 for d in score.dims])


def _downstream(routing: Routing, structure: Structure) -> dict[str, frozenset[str]]:
    """For each drawn site the terms that depend on its draw; all others have mean zero with it."""
    look = routing.guide
    if look is None:
        return {}
    out = {}
    for name in routing.shown:
        moved = {name} | {u for u in look.sites if name in look.scopes.get(u, frozenset())}
        below = {GuideSites.prefix + u for u in moved}
        # Sites without observed descendants have no recorded parents: they may depend on any draw.
        unknown = [n for n in routing.drawn if n not in structure.sites]
        below |= {*unknown, *(f"kl:{n}" for n in unknown)}
        for site, info in structure.sites.items():
            if set(info.scope) & moved or site in moved:
                below |= {site, f"kl:{site}"}
        out[name] = frozenset(below)
    return out
