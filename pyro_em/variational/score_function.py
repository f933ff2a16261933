"""The score-function estimator: gradients through draws that cannot be reparameterised.

For a draw y of the guide with downstream cost C_y, the terms of the bound that depend on y, and a
baseline b_y that does not depend on it,

    ∇ E_q[C_y] = E_q[∇ C_y + (C_y − b_y) ∇ log q(y)].

A draw of one element of a plate reaches the terms of that element only, unless elements read each
other; baselines are decaying averages of the cost, or what the user's ``infer`` gives.

Source: Ranganath, Gerrish and Blei (2014), "Black box variational inference", for the
Rao–Blackwellisation by downstream terms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_em.graph.structure import Structure
from pyro_em.tracing.handlers import GuideSites
from pyro_em.variational.pair import Routing
from pyro_em.variational.particle import Particle, Term


def _onto(value: Tensor, dims: Sequence[str], score: Term, plates: Sequence[str]) -> Tensor:
    """Sum a term over plates that are not kept, and lay it out over the drawn site's plates."""
    shared = [d for d in dims if d and d in plates]
    axes = [i for i, d in enumerate(dims) if d not in shared]
    value = value.sum(axes) if axes else value
    order = [shared.index(d) for d in score.dims if d in shared]
    value = value.permute(order) if order else value
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if d in shared else 1 for d in score.dims])


def downstream_terms(routing: Routing, structure: Structure) -> dict[str, frozenset[str]]:
    """For each drawn site the terms that depend on its draw; all others have mean zero with it."""
    guide = routing.guide
    if guide is None:
        return {}
    out = {}
    for name in routing.shown:
        moved = {name} | {u for u in guide.sites if name in guide.scopes.get(u, frozenset())}
        below = {GuideSites.prefix + u for u in moved}
        # Sites without observed descendants have no recorded parents: they may depend on any draw.
        unknown = [n for n in routing.drawn if n not in structure.sites]
        below |= {*unknown, *(f"kl:{n}" for n in unknown)}
        for site, info in structure.sites.items():
            if set(info.scope) & moved or site in moved:
                below |= {site, f"kl:{site}"}
        out[name] = frozenset(below)
    return out


def coupled_sites(routing: Routing, structure: Structure) -> frozenset[str]:
    """Drawn sites of which an element reaches terms of other elements of its plate."""
    guide = routing.guide
    if guide is None:
        return frozenset()
    coupled = {*structure.coupled, *guide.coupled}
    below = {n: {n, *(u for u, s in guide.scopes.items() if n in s)} for n in routing.shown}
    return frozenset(n for n, reached in below.items() if reached & coupled)


def score_terms(
    particle: Particle,
    downstream: Mapping[str, frozenset[str]],
    shared: Collection[str],
    baselines: dict[str, float],
) -> Tensor | float:
    """Σ_y (C_y − b_y) log q(y), zero in value, the score function in gradient.

    Args:
        particle: One draw.
        downstream: For each drawn site the terms that depend on its draw.
        shared: Drawn sites of which an element reaches terms of other elements of its plate.
        baselines: Decaying averages of downstream costs, which go on with this draw.
    """
    total: Tensor | float = 0.0
    for name, score in particle.scores.items():
        below = downstream.get(name)
        # Elements that read each other share all costs; others have those of their own.
        dims = () if name in shared else score.dims
        cost: Tensor | None = None
        for t in particle.terms:
            if below is not None and t.role is not None and t.site not in below:
                continue
            part = _onto(t.value.detach(), t.dims, score, dims)
            cost = part if cost is None else cost + part
        assert cost is not None
        cost = cost.expand_as(score.value) if name in shared else cost
        weight, options = particle.weight, particle.baselines.get(name) or {}
        # A run among several holds its share of the cost, and of the baseline.
        baseline, baseline_loss = _baseline(baselines, name, cost * weight.runs, options)
        share = weight.over(score.dims)
        surrogate = ((cost - baseline * share).detach() * score.value).sum()
        total = total + (surrogate - surrogate.detach())
        if baseline_loss is not None:
            total = total - (baseline_loss - baseline_loss.detach())
    return total


def _baseline(
    baselines: dict[str, float], name: str, cost: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor | float, Tensor | None]:
    """A decaying average of the cost, and a user's ``infer={"baseline": …}`` on top of it."""
    decay = float(options.get("baseline_beta", 0.9))
    size = max(cost.numel(), 1)
    mean = float(cost.sum()) / size
    known = name in baselines
    average = baselines.get(name, 0.0)  # never of this draw: that would be a bias
    baselines[name] = decay * average + (1 - decay) * mean if known else mean
    learned: Tensor | None = None
    if "nn_baseline" in options:
        learned = options["nn_baseline"](options["nn_baseline_input"].detach())
    elif "baseline_value" in options:
        learned = options["baseline_value"]
    if learned is None:
        return average, None
    learned = learned.reshape(cost.shape)
    rest = cost - average if options.get("use_decaying_avg_baseline") else cost
    shift = average if options.get("use_decaying_avg_baseline") else 0.0
    return learned.detach() + shift, (learned - rest).pow(2).sum()
