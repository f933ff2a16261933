"""Numbers of all rows whose data come in parts: what each part says adds up.

    ELBO(q, θ) = Σ_parts ELBO(q_part, θ),    log p(x; θ) = Σ_parts log p(x_part; θ)

Factors outside the rows, priors among them, count once: with the first part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_em.analysis.elbo import ELBOTerms, elbo_terms
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.part import Part, Totals
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.reduction.trees import added
from pyro_em.tracing.parameters import parameters_at
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import dot


def elbo_of_parts(parts: Iterable[Part], params: Mapping[str, Tensor], index: int) -> ELBOTerms:
    """ELBO(q, θ) of all rows, with q the E-step.

    Args:
        parts: The parts, of which one at a time is held.
        params: Constrained values in place of the current ones.
        index: Steps taken before, for E-steps that depend on it.
    """
    total: ELBOTerms | None = None
    for part in parts:
        with parameters_at(part.program.graph.parameters, params):
            evaluation = part.program.evaluate()
            at = part.program.posterior(evaluation)
            q = part.program.e_step(evaluation, index)
            terms, left_out = elbo_terms(evaluation, q, at), part.left_out(evaluation.graph)
            own = _without(terms, evaluation, q, left_out)
        total = own if total is None else _sum(total, own)
    assert total is not None
    return replace(total, pointwise=None)


def _without(
    terms: ELBOTerms, evaluation: Evaluation, q: Posterior, left_out: Sequence[int]
) -> ELBOTerms:
    """The terms without those of some groups, which no latent reaches.

    Args:
        terms: The terms of all groups.
        evaluation: The factors.
        q: The E-step.
        left_out: The groups.
    """
    graph = evaluation.graph
    prior = data = 0.0
    for g in left_out:
        own = float(dot(q.counts[g], evaluation.tables[g]))
        if graph.groups[g].role is Role.POINT:
            prior += own
        else:
            data += own
    evidence, reconstruction = terms.log_evidence, terms.reconstruction
    return replace(
        terms,
        value=terms.value - prior - data,
        log_evidence=None if evidence is None else evidence - data,
        expected_log_joint=terms.expected_log_joint - prior - data,
        reconstruction=None if reconstruction is None else reconstruction - data,
        log_prior=terms.log_prior - prior,
    )


_ADDED = (
    "value",
    "log_evidence",
    "gap",
    "expected_log_joint",
    "entropy",
    "reconstruction",
    "kl",
    "log_prior",
)


def _sum(a: ELBOTerms, b: ELBOTerms) -> ELBOTerms:
    """The terms of the rows of both."""

    def both(name: str) -> Any:
        x, y = getattr(a, name), getattr(b, name)
        return None if x is None or y is None else x + y

    return replace(a, **{name: both(name) for name in _ADDED})


def log_evidence_of_parts(passes: Callable[[], Iterable[Part]]) -> float:
    """log p(x; θ) of all rows at the current parameters, in nats.

    Latents outside the rows are found in a pass before.

    Args:
        passes: Makes the parts of one pass, of which one at a time is held.
    """
    totals: Totals = {}
    evidence = []
    for part in passes():
        own = part.naturals()
        if own:
            totals = added(totals, own) if totals else own
        else:
            evidence.append(part.log_evidence())
    if not totals:
        return math.fsum(evidence)
    return math.fsum(part.log_evidence(totals) for part in passes())


def bound_of_parts(parts: Iterable[Part], index: int) -> float:
    """ELBO(q, θ) of all rows, log prior included, with q the E-step of a strategy, in nats.

    Args:
        parts: The parts, of which one at a time is held.
        index: Steps taken before, for E-steps that depend on it.
    """
    return math.fsum(part.summary(index).bound for part in parts)
