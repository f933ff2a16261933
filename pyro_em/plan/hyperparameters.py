"""Free hyperparameters above point estimates: a joint density p(h | η) p(x | h) without a maximum.

Where η sets how concentrated the prior of h is, the density of h at its own mode grows without end
as the prior contracts there, whatever the data are: Normal(h | m, s) ~ 1/s at h = m, and
Gamma(h | a, b) ~ b/√a at its mode. What should be maximised over η is the evidence, in which h is
integrated out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.distributions import is_real
from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role

_MARGINALS = {
    "Beta": "BetaBinomial for a Binomial",
    "Gamma": "GammaPoisson for a Poisson",
    "Dirichlet": "DirichletMultinomial for a Multinomial",
}


@dataclass(frozen=True)
class Hyperparameter:
    """One parameter that sets how concentrated the prior of a point estimate is.

    Attributes:
        site: The point-estimated site.
        distribution: The name of its prior.
        argument: The prior's argument.
        parameter: The parameter in it.
    """

    site: str
    distribution: str
    argument: str
    parameter: str


def free_hyperparameters(graph: FactorGraph) -> Iterator[Hyperparameter]:
    """The hyperparameters along which the joint density has no bound.

    A concentration that is a point estimate itself has a prior, which may hold it back; the scale of
    a hierarchical prior seldom has one that does. A spread that the data have too (a
    Normal–inverse-gamma prior) is held back by them.
    """
    held = set(_spreads_of_data(graph))
    estimated = {
        name
        for g in graph.groups
        if g.role is Role.POINT and g.value_binding is not None
        for name in g.value_binding.params
    }
    for group in graph.groups:
        if group.role is not Role.POINT:
            continue
        for argument, name in group.hyperparameters:
            if name in held:
                continue
            if argument == "scale" or name not in estimated:
                yield Hyperparameter(group.members[0], group.distribution, argument, name)


def _spreads_of_data(graph: FactorGraph) -> Iterator[str]:
    """The parameters that are, or set, a spread of what is observed."""
    for group in graph.groups:
        if group.role is not Role.DATA or group.family is None or not group.observed:
            continue
        for argument, binding in group.bindings.items():
            rule = group.family.rules.get(argument)
            if rule is not None and rule.kind.is_spread:
                yield from binding.params


def unbounded_joints(graph: FactorGraph, fixed: Collection[str]) -> list[str]:
    """A note for every point estimate whose joint density with its hyperparameters has no maximum.

    Args:
        graph: A traced graph.
        fixed: Names of parameters that never change.
    """
    by_site: dict[str, list[Hyperparameter]] = {}
    for h in free_hyperparameters(graph):
        if h.parameter in fixed:
            continue
        by_site.setdefault(h.site, []).append(h)
    notes = []
    for site, found in by_site.items():
        kind = found[0].distribution
        arguments = " and ".join(dict.fromkeys(h.argument for h in found))
        names = ", ".join(dict.fromkeys(f"'{h.parameter}'" for h in found))
        are = "are parameters" if " and " in arguments else "is a parameter"
        notes.append(
            message(
                f"site '{site}'",
                f"it is a point estimate, and the {arguments} of its {kind} prior {are}: {names}.",
                "their joint density grows without bound as the prior contracts and the site goes to "
                "its mode",
                [
                    "give the site a spread: a guide such as AutoNormal",
                    f"fix the {arguments}: updates={{'...': Fixed()}}, or give it a prior",
                    "leave the guide out where the latent has an exact route; a marginal is one"
                    + (f" ({_MARGINALS[kind]})" if kind in _MARGINALS else ""),
                ],
            )
        )
    return notes


def run_away(
    graph: FactorGraph, initial: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> str:
    """What to say of a hyperparameter that has run towards a limit of numbers; empty for none.

    Args:
        graph: The graph.
        initial: Constrained values at the start.
        values: Those now.
    """
    for h in free_hyperparameters(graph):
        parameter = graph.parameters[h.parameter]
        before, now = initial.get(h.parameter), values.get(h.parameter)
        if before is None or now is None or before.shape != now.shape:
            continue
        real = is_real(parameter.constraint)
        if not _has_run(before, now, real=real):
            continue
        return message(
            f"parameter '{h.parameter}'",
            f"the objective rises without end along it: from {_shown(before)} it has run to "
            f"{_shown(now)}, and no value is an estimate.",
            f"it is the {h.argument} of the {h.distribution} prior of the point estimate '{h.site}': "
            "their joint density grows without bound as the prior contracts",
            [
                "fix it: updates={'" + h.parameter + "': Fixed()}, or give it a prior",
                f"give '{h.site}' a spread: a guide such as AutoNormal",
                "leave the guide out where the latent has an exact route, such as a marginal",
            ],
        )
    return ""


def _has_run(before: Tensor, now: Tensor, *, real: bool) -> bool:
    """Whether a number has changed by a factor that takes nearly half of a number's digits."""
    far = max(-0.45 * math.log(torch.finfo(now.dtype).eps), math.log(1e4))
    if real:  # a logarithm or the like inside the model
        return bool(((now - before).abs() > far).any())
    if _is_matrix(now):
        before, now = torch.linalg.svdvals(before), torch.linalg.svdvals(now)
    tiny = torch.finfo(now.dtype).tiny
    ratio = now.abs().clamp(min=tiny).log() - before.abs().clamp(min=tiny).log()
    return bool((ratio.abs() > far).any())


def _is_matrix(value: Tensor) -> bool:
    return value.dim() >= 2 and value.shape[-1] == value.shape[-2] > 1


def _shown(value: Tensor) -> str:
    if _is_matrix(value):
        low, high = (f"{float(v):.3g}" for v in torch.linalg.svdvals(value).aminmax())
        return f"singular values from {low} to {high}"
    if value.numel() > 1:
        low, high = (f"{float(v):.3g}" for v in value.aminmax())
        return f"values from {low} to {high}"
    return f"{float(value):.3g}"
