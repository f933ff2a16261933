"""One draw of the guide, as the terms of the bound: a `Particle`.

Where nothing is summed exactly, the pair of guide and model runs once and each of its sites is a term,

    log p(x, h) − log q(h | x)   at   h ~ q(h | x).

Where discrete latents z are summed under the draw, the model's factors are contracted at h, and their
log Σ_z p(x, z, h) takes the place of the model's terms; Gaussian latents that are linear given the draw
are integrated before. Log densities of the guide count with the
draw's gradient where it is reparameterised; elsewhere they are detached, and the score that
`pyro_em.variational.score_function` needs stands beside the terms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.trace import trace_graph
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.continuous.gaussian_components import NotSeparate
from pyro_em.posteriors.continuous.gaussian_steps import tables_of
from pyro_em.posteriors.contraction import contract
from pyro_em.posteriors.enumeration import contraction_of, scales_of
from pyro_em.posteriors.exact import exact_posterior
from pyro_em.tracing.densities import add_log_prob, elements_of
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.handlers import GuideSites
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role, roles_in
from pyro_em.variational.divergence import minus_kl
from pyro_em.variational.guide import GuideLook
from pyro_em.variational.integrating import AttachedRun, integrated_run, not_here
from pyro_em.variational.pair import AtDraw, Laid, Pair
from pyro_em.variational.particle import (
    Particle,
    Term,
    Weight,
    dims_of,
    is_reparameterised,
)
from pyro_em.variational.summands import Summand, cost_of

_FULL = Weight()


def plain_draw(
    pair: Pair,
    args: tuple,
    kwargs: dict[str, Any],
    factors: Mapping[str, float],
    report: bool,
    known: Collection[str],
) -> Particle:
    """One draw of a pair in which no latent is summed exactly.

    Args:
        pair: The guide, then the model at its values.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        factors: Per plate what multiplies its sites.
        report: Whether log q is wanted as well where it is not needed for the bound.
        known: Latents whose terms are replaced by their KL divergence in closed form.
    """
    sites = pair.drawn(args, kwargs, factors)
    summands: list[Summand] = []
    values: dict[str, Tensor] = {}
    is_plain = not report
    for name, role in roles_in(sites).items():
        if role is Role.LATENT:
            continue
        site, latent = sites[name], name
        if role is not Role.DATA:
            latent = name.removeprefix(GuideSites.prefix)
            values[latent] = site["value"]
        follows = role is not Role.GUIDE or is_reparameterised(site)
        is_plain = is_plain and follows
        if report or not follows:
            add_log_prob(site)
        if latent in known and role is not Role.DATA:
            if role is Role.SAMPLED:
                summands.append(minus_kl(latent, site, sites[GuideSites.prefix + latent]))
            continue
        if report or not follows:
            found = site["log_prob"], 0, 1
        else:
            found = elements_of(site)
        elements, event_dim, sign = found
        if role is Role.GUIDE:
            elements, sign = elements if follows else elements.detach(), -sign
        summands.append(Summand(name, role, site, elements, event_dim, sign))
    terms = LaterTuple(lambda: tuple(s.term() for s in summands))
    cost = cost_of(summands)
    if is_plain:
        return Particle(terms, {}, values, cost=cost)
    return replace(_with_scores(terms, sites, None, report, values), cost=cost)


def summed_draw(
    laid: Laid,
    guide: GuideLook,
    args: tuple,
    kwargs: dict[str, Any],
    report: bool,
    chosen: Mapping[str, int],
    factors: Mapping[str, float],
) -> Particle:
    """One draw of a pair with latents that are summed or integrated exactly under it.

    Args:
        laid: Guide and model for these arguments.
        guide: What runs of the guide showed.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        report: Whether log q is wanted as well where it is not needed for the bound.
        chosen: Guide sites that are held at a value instead, and weighed by its probability.
        factors: Per plate what multiplies its sites.

    Raises:
        ModelError: If the model is not linear in a Gaussian latent at this draw.
        UsageError: If a batch stands for all data, and a Gaussian latent is outside its plate.
    """
    try:
        graph, drawn = drawn_graph(laid, args, kwargs, chosen=chosen, factors=factors)
    except (NotLinear, NotSeparate, NotConjugate) as error:
        raise not_here(error, "at this draw of the guide") from error
    weight = Weight(tuple(_weight_of(drawn.held[n]) for n in chosen))
    plan = contraction_of(graph)
    tables = [g.log_density().to(torch.float64) for g in graph.groups]
    flat: list[Tensor] = []
    terms: list[Term] = []
    sites: dict[str, dict[str, Any]] = {}
    for group, table in zip(graph.groups, tables, strict=True):
        for i, name in enumerate(group.members):
            if group.role is not Role.GUIDE:
                flat.append(table[i])
                continue
            latent = name.removeprefix(GuideSites.prefix)
            log_q = table[i] * group.scale[i]
            sites[name] = {
                "fn": guide.sites[latent]["fn"],
                "infer": drawn.infer[latent],
                "log_prob": log_q,
                "score": table[i],
                "dims": group.dims[i],
            }
            follows = latent in chosen or is_reparameterised(sites[name])
            value = log_q if follows else log_q.detach()
            terms.append(Term(name, Role.GUIDE, group.dims[i], -value, group.scale[i]))
            flat.append(torch.zeros_like(table[i]))
    scale = _common_scale(graph)
    for dims, value in contract(plan, flat, scales=scales_of(graph)):
        terms.append(Term("summed", None, dims, value, scale))
    return _with_scores(tuple(terms), sites, graph, report, drawn.values, weight, chosen)


@fewer_collections()
def drawn_graph(
    laid: Laid,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    chosen: Mapping[str, int] | None = None,
    factors: Mapping[str, float] | None = None,
    limit: int | None = None,
    bindings: bool = False,
) -> tuple[FactorGraph, GuideSites]:
    """The factor graph at one draw of the guide, its Gaussian and conjugate latents integrated.

    Args:
        laid: Guide and model for these arguments.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        chosen: Guide sites that are held at a value instead.
        factors: Per plate what multiplies its sites in this run.
        limit: How many numbers the matrices of one E-step may have.
        bindings: Whether it is wanted how parameters reach the arguments, in place of gradients.

    Returns:
        The graph, attached to parameters and draws, and what was drawn.

    Raises:
        NotLinear: If the model is not linear in a Gaussian latent at this draw.
        NotConjugate: If a latent has a child that is not conjugate to it at this draw.
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
        UsageError: If a batch stands for all data, and a Gaussian latent is outside its plate.
    """
    record: list[GuideSites] = []
    runs: list[Run] = []
    recording = replace(laid.pair, record=record, chosen=chosen or {})
    graph = trace_graph(
        laid.on(recording),
        args,
        kwargs,
        laid.structure,
        with_bindings=bindings,
        keep_random_state=False,
        attached=not bindings,
        runs=runs,
    )
    drawn = record[-1]
    if laid.references is None:
        return graph, drawn
    at_draw = AtDraw(laid.pair.model, laid.pair.roles, drawn)
    what = runs[-1], at_draw, laid.references, laid.structure, args, kwargs, drawn.state
    run = AttachedRun(*what, tuple(drawn.values.values()), laid.kernels)
    return integrated_run(graph, run, factors, limit), drawn


def _with_scores(
    terms: Sequence[Term],
    sites: Mapping[str, dict[str, Any]],
    graph: FactorGraph | None,
    report: bool,
    values: Mapping[str, Tensor],
    weight: Weight = _FULL,
    chosen: Collection[str] = (),
) -> Particle:
    """The terms with the scores of draws that are not reparameterised, as one draw."""
    if weight.parts:
        terms = tuple(replace(t, value=weight.weigh(t.value, t.dims)) for t in terms)
    scores, baselines, log_q = {}, {}, 0.0
    for name, site in sites.items():
        if not name.startswith(GuideSites.prefix):
            continue
        latent = name.removeprefix(GuideSites.prefix)
        if report and "log_prob" in site:
            log_q_here = site["log_prob"].detach()
            log_q += float(weight.weigh(log_q_here, site.get("dims", ())).sum())
        if latent not in chosen and not is_reparameterised(site):
            # The cost carries the scale, the score does not.
            if "score" in site:
                score, dims = site["score"], site["dims"]
            else:
                score = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
                dims = dims_of(site, score)
            scores[latent] = Term(latent, Role.GUIDE, dims, score)
            baselines[latent] = site.get("infer", {}).get("baseline", {})
    return Particle(terms, scores, values, graph, log_q, baselines, weight)


def inner_posterior(
    graph: FactorGraph, weight: Weight = _FULL
) -> tuple[Posterior, tuple[Group, ...]]:
    """p(z | x, h) at one draw h, and the model's factors; arbitrary where the draw has no weight."""
    groups = tuple(g for g in graph.groups if g.role is not Role.GUIDE)
    model = FactorGraph(graph.structure, graph.latents, groups, graph.parameters)
    with torch.no_grad():
        arguments = [detached(g.arguments) for g in groups]
        tables, solved = tables_of(model, arguments, [g.value for g in groups])
    tables = [
        torch.stack(
            [weight.possible(t, d) for t, d in zip(table.detach(), group.dims, strict=True)]
        )
        for table, group in zip(tables, groups, strict=True)
    ]
    q = exact_posterior(model, contraction_of(model), tables)
    return (replace(q, solved=solved) if solved else q), groups


def detached(arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers without what they were computed from."""
    return {a: t.detach() for a, t in arguments.items()}


def _weight_of(site: Mapping[str, Any]) -> tuple[tuple[str, ...], Tensor, int]:
    """The probability of the value at which a guide site is held; see `Weight`."""
    fn = site["fn"]
    probability = fn.log_prob(site["value"]).exp()
    # Pyro keeps a probability of zero at eps, and the record of a family does not.
    tiny = probability <= 2 * torch.finfo(probability.dtype).eps
    probability = torch.where(tiny, 0.0, probability).to(torch.float64)
    dims = dims_of(site, probability)
    shape = [size for d, size in zip(dims, probability.shape, strict=True) if d]
    size = len(fn.enumerate_support(expand=False))
    return tuple(d for d in dims if d), probability.reshape(shape), size


def _common_scale(graph: FactorGraph) -> float | None:
    """The one number by which all sites of the model are scaled; None if there is none."""
    scales = {
        float(s) if not isinstance(s, Tensor) else math.nan
        for g in graph.groups
        if g.role is not Role.GUIDE and g.n_plates
        for s in g.scale
    }
    only = scales.pop() if len(scales) == 1 else math.nan
    return None if math.isnan(only) else only
