"""Models whose continuous latents are Gaussian and linear: what a look at them needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pyro_em.distributions import has_finite_support
from pyro_em.errors import Finding, as_error, remedy
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear, is_gaussian, is_matrix_of_rows
from pyro_em.graph.structure import Structure
from pyro_em.plan.routes import Route, routes_of
from pyro_em.plan.unrouted import Unrouted, without_route
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.scales.scaled import ScaledBlock
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.missing import LAGGED
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role, mask_tensor

WEIGHED = "poutine.scale weighs it: put that around its observations alone"
MASKED = "a mask covers it"
_UNMASKED = (
    "put poutine.mask around its observations alone, as `with mask(...): pyro.sample(..., obs=y[t])`: "
    "what nothing observes integrates to one, and the evidence is that of the steps that are there"
)


def with_values(
    model: Model, structure: Structure, *, weighed: bool = False
) -> GivenGaussians | None:
    """The model with its continuous latents at zero; None where one of them is no Gaussian.

    Args:
        model: The user's model.
        structure: Its skeleton.
        weighed: Whether latents may be weighed, as rows are whose scale is a latent itself.

    Raises:
        NotLinear: If a Gaussian latent is masked, weighted, or a matrix of correlated rows.
    """
    run = structure.as_run
    sites = {n: run.unobserved[n] for n in run.latents}
    continuous = {n: s for n, s in sites.items() if not has_finite_support(s["fn"])}
    if not continuous or structure.random_plates:
        return None
    if not all(is_gaussian(s["fn"]) for s in continuous.values()):
        return None
    for name, site in continuous.items():
        problem = why_not_separate(site) if weighed else why_not_integrable(site)
        if problem:
            fixes: tuple[str, ...] = (_UNMASKED,) if problem == MASKED else ()
            if name in _unobserved_parts(structure):
                problem, fixes = "it is missing, and other sites read it.", (LAGGED,)
            raise NotLinear(Finding(f"site '{name}'", problem, "", fixes, latents=(name,)))
    return GivenGaussians(model, {n: _zeros(n, s, structure) for n, s in continuous.items()})


def _unobserved_parts(structure: Structure) -> set[str]:
    """What ``obs_mask`` makes latents of."""
    return {f"{name}_unobserved" for name in structure.masked_pairs}


def _zeros(name: str, site: Mapping[str, Any], structure: Structure) -> torch.Tensor:
    """Zeros in place of a latent's value, at all steps of a loop that runs over indices."""
    fn, shape = site["fn"], list(site["value"].shape)
    place = None if structure.series is None else structure.series.places.get(name)
    if place is not None and place.shift is not None:
        loop = structure.series.loops[place.loop]
        shape[len(shape) - fn.event_dim + loop.dim] = loop.rest
    return structure.as_run.nothing_like(name).new_zeros(shape)


def is_integrable(site: Mapping[str, Any]) -> bool:
    """Whether an unobserved site, as it was traced, is one Gaussian for each element of its plates."""
    return is_gaussian(site["fn"]) and not why_not_integrable(site)


def why_not_integrable(site: Mapping[str, Any]) -> str:
    """Why a Gaussian site is not one Gaussian for each element of its plates, or nothing.

    Args:
        site: As it was traced.
    """
    problem = why_not_separate(site)
    is_weighed = isinstance(site["scale"], torch.Tensor) or site["scale"] != 1
    return problem or (WEIGHED if is_weighed else "")


def why_not_separate(site: Mapping[str, Any]) -> str:
    """The same where weights are no matter."""
    if mask_tensor(site) is not None:
        return MASKED
    if is_matrix_of_rows(site["fn"]):
        return "it is a MultivariateNormal under to_event: put its rows in a plate"
    return ""


def require_unweighed(graph: FactorGraph) -> None:
    """Refuse weights of Gaussian latents but of rows that a conjugate scale weighs as a whole.

    Raises:
        NotLinear: If there are such weights.
    """
    for block in (g.nested for g in graph.groups if isinstance(g.nested, GaussianBlock)):
        for site in block.groups:
            if site.role is Role.GAUSSIAN and not site.is_unscaled:
                name = site.members[0]
                raise NotLinear(Finding(f"site '{name}'", WEIGHED, "", (), latents=(name,)))


def explained(unrouted: Unrouted, finding: Finding, *, linear: bool = False) -> Unrouted:
    """What a look found, with the reason why a Gaussian latent has no exact posterior.

    Args:
        unrouted: What the look found.
        finding: The reason.
        linear: Whether the latent enters means linearly, so that what is left without it is Gaussian.
    """
    problems: list[Finding] = []
    told_of: dict[str, tuple[str, ...]] = {}
    for problem in unrouted.error.problems:
        if set(problem.latents) & set(finding.latents):
            reason = f"{finding.where}: {finding.what.rstrip('.')}"
            wrong = ("integrate it out", "its posterior is a")
            kept = tuple(f for f in problem.fixes if linear or not f.startswith(wrong))
            new = (f for f in finding.fixes if f not in problem.fixes)
            told = tuple(f for f in new if not f.startswith("give a guide: "))
            guided = any(f.startswith("give a guide for") for f in told)
            fixes = (*told, *(f for f in kept if not guided or not f.startswith("give a guide: ")))
            told_of[remedy(problem)] = fixes
            why = f"{problem.why}; {reason}" if problem.why else reason
            problem = replace(problem, why=why, fixes=fixes)
        problems.append(problem)
    # What helps one step of a chain helps its others.
    problems = [replace(p, fixes=told_of.get(remedy(p), p.fixes)) for p in problems]
    return without_route(
        unrouted.structure, as_error(problems), routes=unrouted.routes, cost=unrouted.cost
    )


def _children(structure: Structure, lines: Mapping[str, Line]) -> dict[str, list[str]]:
    """The sites whose means read each Gaussian latent; of a loop over indices at every step."""
    out: dict[str, list[str]] = {}
    series = structure.series
    sites = [(n, None) for n in lines] if series is None else series.order()
    for name, t in sites:
        if name not in lines:
            continue
        for latent in dict.fromkeys(r.latent for r in lines[name].reads):
            own = (latent, name)
            if series is not None:
                own = series.name_at(latent, t), series.name_at(name, t)
            out.setdefault(own[0], []).append(own[1])
    return out


def gaussian_routes(
    bare: Structure,
    inner: Structure,
    lines: Mapping[str, Line],
    graph: FactorGraph,
    others: Mapping[str, Route],
) -> tuple[Route, ...]:
    """The rows of the plan: Gaussian latents in the place that they have in the model.

    Args:
        bare: The skeleton of the user's model.
        inner: That of the model with its Gaussian latents given.
        lines: How these enter means.
        graph: The factor graph.
        others: Rows of latents that are integrated otherwise.
    """
    rows = {r.site: r for r in routes_of(inner)} | dict(others)
    children = _children(inner, lines)
    nested = (g.nested for g in graph.groups)
    found = (b.gaussian if isinstance(b, ScaledBlock) else b for b in nested)
    blocks = {n: b for b in found if isinstance(b, GaussianBlock) for n in b.latents}
    out = []
    for name in (*bare.latents, *bare.barren):
        if name in rows:
            out.append(rows[name])
            continue
        info = bare.sites[name]
        shown = ", ".join(f"'{c}'" for c in children.get(name, ())[:3])
        out.append(
            Route(
                name,
                info.distribution,
                "Gaussian",
                None,
                info.plates,
                f"linear in {shown}; {blocks[name].kind}",
            )
        )
    return tuple(out)
