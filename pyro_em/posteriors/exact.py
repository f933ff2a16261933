"""How a `Posterior` comes about: exact, from the cells of another E-step, from a user's marginals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.laid_out import LaidGroups
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.contraction import contract, evidence, log_sum_exp
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import (
    EStep,
    Tables,
    e_step,
    forward,
    run_contraction,
    scales_of,
)
from pyro_em.posteriors.messages.steps import LEAST, step_cells
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import dot, expected_log_joint

_SUSPECT = 1e9  # nats: an E-step looks more closely at a log density above it


def exact_posterior(
    graph: FactorGraph, plan: ContractionPlan, log_densities: Sequence[Tensor]
) -> Posterior:
    """Run the E-step and wrap it."""
    separate, held = _without_priors(graph, log_densities)
    result = e_step(graph, plan, held)
    cells, counts = _cells_and_counts(graph, result.cells)
    expected = expected_log_joint(counts, log_densities)
    apart = _separate_log_prior(graph, separate, counts, log_densities)
    joint = _joint_log_prior(graph, plan, separate, held)
    total = float(result.log_evidence) + apart
    log_prior = apart + (joint or 0.0)
    return Posterior(
        graph,
        cells,
        counts,
        total - log_prior,
        True,
        [t.detach() for t in log_densities],
        total - expected,
        _pointwise(graph, result) if joint is None else None,
        log_prior,
        total,
    )


def log_evidence_of(
    graph: FactorGraph, plan: ContractionPlan, log_densities: Sequence[Tensor]
) -> float:
    """The log evidence in nats, without a posterior: half the work of an E-step.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        log_densities: Per group. # (members, *sizes)

    Raises:
        DataError: If the data are impossible under the model, or a density is not a number.
    """
    if not any(g.role is Role.POINT for g in graph.groups):
        with torch.no_grad():
            chain = step_cells(graph, log_densities)
            if chain is not None:
                return float(chain.log_evidence)
            total = float(forward(graph, plan, log_densities, log_sum_exp)[2])
        if math.isfinite(total) and total < _SUSPECT:
            return total
    # This says what is wrong, or sums the priors.
    posterior = exact_posterior(graph, plan, log_densities)
    assert posterior.log_evidence is not None
    return posterior.log_evidence


def log_evidence_as_laid(graph: FactorGraph, plan: ContractionPlan) -> float | None:
    """The log evidence in nats of a graph at its run, without its groups; None where it takes them.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
    """
    groups = graph.groups
    if not isinstance(groups, LaidGroups) or len(graph.structure.latents) >= LEAST:
        return None
    with torch.no_grad():
        tables = [t[0].to(torch.float64) for t in groups.log_densities()]
        terms = contract(plan, tables, scales=scales_of(graph), ring=log_sum_exp)
        total = float(evidence(terms))
    return total if math.isfinite(total) and total < _SUSPECT else None


def _cells_and_counts(graph: FactorGraph, scaled: Tables) -> tuple[list[Tensor], list[Tensor]]:
    """Probabilities of cells, and expected counts, from the gradient of a contraction."""
    cells, counts = [], []
    for group, table in zip(graph.groups, scaled, strict=True):
        cells.append(_unscaled(group, table))
        counts.append(table if group.mask is None else table * group.mask)
    return cells, counts


def wrapped(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    scaled: Tables,
    *,
    bound: float,
    entropy: float,
) -> Posterior:
    """A q that is not the exact posterior, from its cells.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        log_densities: Per group, at θ.
        scaled: Per group scale × probability of every cell. # (members, *sizes)
        bound: ELBO(q, θ) in nats, log prior included.
        entropy: H(q) in nats.
    """
    cells, counts = _cells_and_counts(graph, scaled)
    separate, held = _without_priors(graph, log_densities)
    log_prior = _separate_log_prior(graph, separate, counts, log_densities)
    log_prior += _joint_log_prior(graph, plan, separate, held) or 0.0
    return Posterior(
        graph,
        cells,
        counts,
        None,
        False,
        [t.detach() for t in log_densities],
        entropy,
        None,
        log_prior,
        bound,
    )


def _without_priors(graph: FactorGraph, tables: Tables) -> tuple[list[int], list[Tensor]]:
    """Groups that are log priors on their own, and the tables with those left out."""
    separate = [
        k
        for k, g in enumerate(graph.groups)
        if g.role is Role.POINT and not any(d in graph.latents for ds in g.dims for d in ds)
    ]
    return separate, [torch.zeros_like(t) if k in separate else t for k, t in enumerate(tables)]


def _separate_log_prior(
    graph: FactorGraph, separate: Sequence[int], counts: Tables, tables: Tables
) -> float:
    """The log density of point-estimated latents that no summed latent reaches, in nats."""
    total = 0.0
    for k in separate:
        part = float(dot(counts[k], tables[k]))
        if not math.isfinite(part):
            group = graph.groups[k]
            bad = ~torch.isfinite(tables[k])
            site = group.members[int(bad.nonzero()[0][0])] if bool(bad.any()) else group.members[0]
            raise DegenerateError(
                message(
                    f"site '{site}'",
                    f"its log prior is {part} at the present point estimate.",
                    f"the density of {group.distribution} is unbounded or zero there",
                    [
                        "use a prior that is bounded at the boundary (concentrations of at least 1)",
                        "start elsewhere: init_loc_fn= of AutoDelta",
                    ],
                )
            )
        total += part
    return total


def _joint_log_prior(
    graph: FactorGraph, plan: ContractionPlan, separate: Sequence[int], tables: Tables
) -> float | None:
    """log p(h) of point-estimated latents below summed ones: the evidence without the data."""
    if all(g.role is not Role.POINT for k, g in enumerate(graph.groups) if k not in separate):
        return None
    without_data = [
        torch.zeros_like(t) if g.role is Role.DATA else t
        for g, t in zip(graph.groups, tables, strict=True)
    ]
    return float(run_contraction(graph, plan, without_data).log_evidence)


def _unscaled(group: Group, table: Tensor) -> Tensor:
    if group.is_unscaled:
        return table
    parts = []
    for i, s in enumerate(group.scale):
        parts.append(table[i] / s)
    return torch.stack(parts)


def _pointwise(graph: FactorGraph, result: EStep) -> Tensor | None:
    outermost = graph.structure.data_plate
    if outermost is None:
        return None
    total: Tensor | None = None
    for dims, term in result.terms:
        if outermost not in dims:
            if bool((term == 0).all()):
                continue
            return None
        axes = [i for i, d in enumerate(dims) if d != outermost]
        part = term.sum(axes) if axes else term
        total = part if total is None else total + part
    return total
