"""The one objective: ELBO(q, θ) = E_q[log p(x, z; θ)] + H(q), and its terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.given_q import as_posterior
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.portable import Portable
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.continuous.gaussian_steps import in_m_step
from pyro_em.tracing.parameters import parameters_at
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import dot
from pyro_em.variational.bound import Variational
from pyro_em.variational.particle import Particle
from pyro_em.variational.parts import split


@dataclass(frozen=True, eq=False)
class ELBOTerms(Portable):
    r"""The evidence lower bound and what it is made of, all in nats.

    value = expected_log_joint + entropy = reconstruction − kl + log_prior, and
    log_evidence = (value − log_prior) + gap with gap = KL(q ‖ p(z | x; θ)) ≥ 0.

    Attributes:
        value: The bound.
        exact: Whether no sampling was involved.
        log_evidence: log p(x; θ), None unless it can be computed exactly.
        gap: log_evidence − (value − log_prior).
        expected_log_joint: E_q[log p(x, z; θ)].
        entropy: H(q); a Monte Carlo estimate where a guide draws.
        reconstruction: E_q[log p(x | z; θ)]; None with ``pyro.factor`` terms.
        kl: KL(q(z) ‖ p(z; θ)); None with ``pyro.factor`` terms.
        log_prior: Log density of point-estimated parameters.
        standard_error: Of ``value``; 0 where nothing is sampled, None with one draw.
        pointwise: Per element of the outermost data plate its log evidence, whatever q is; where a
            guide draws, its bound; None without such a plate.
    """

    value: float
    exact: bool
    log_evidence: float | None
    gap: float | None
    expected_log_joint: float
    entropy: float
    reconstruction: float | None
    kl: float | None
    log_prior: float = 0.0
    standard_error: float | None = 0.0
    pointwise: Tensor | None = field(default=None, repr=False)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        error = "" if not self.standard_error else f" ± {self.standard_error:.3g}"
        lines = [f"ELBO {self.value:.6f}{error} nats" + (" (exact)" if self.exact else "")]
        if self.reconstruction is not None and self.kl is not None:
            prior = f" + log prior {self.log_prior:.6f}" if self.log_prior else ""
            lines.append(f"  = reconstruction {self.reconstruction:.6f} - KL {self.kl:.6f}{prior}")
        joint, entropy = self.expected_log_joint, self.entropy
        lines.append(f"  = expected log joint {joint:.6f} + entropy {entropy:.6f}")
        if self.log_evidence is not None:
            lines.append(f"log evidence {self.log_evidence:.6f}, gap {self.gap:.6g}{error}")
        if self.standard_error is None:
            lines.append("one draw: elbo(..., num_particles=n) gives a standard error")
        return "\n".join(lines)


def elbo_at(
    planner: Planner,
    found: Program | Variational,
    args: tuple,
    kwargs: dict[str, Any],
    q: Posterior | Mapping[str, Any] | None,
    params: Mapping[str, Tensor],
    num_particles: int,
    index: int,
) -> ELBOTerms:
    """ELBO(q, θ) of whatever a model turned out to be; see `ExactPosteriorEM.elbo`.

    Args:
        planner: What the user asked for.
        found: What the model with its guide is.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        q: In place of the E-step's; as the user gave it.
        params: Constrained values in place of the current ones.
        num_particles: Draws where a guide draws.
        index: Steps taken before, for E-steps that depend on it.

    Raises:
        UsageError: If ``q`` does not fit the model.
    """
    program = found if isinstance(found, Program) else None
    if isinstance(found, Variational):
        if q is None:
            with parameters_at(found.parameters, params):
                beside = planner.exact_beside(found, args, kwargs)
                at = None if beside is None else beside.posterior()
                return drawn_terms(found, args, kwargs, num_particles, at)
        _refuse_tables(found, q)
        program = planner.exact_beside(found, args, kwargs)
    if program is None:
        raise UsageError(
            message(
                "elbo",
                "q was given, but the model has latents without an exact posterior.",
                "a table of probabilities can stand for discrete latents only",
                ["leave q out: the guide is q"],
            )
        )
    with parameters_at(program.graph.parameters, params):
        is_nested = any(g.nested is not None for g in program.graph.groups)
        if q is None and program.strategy is None and not is_nested:
            at = program.posterior_at()  # whose log densities are those at θ
            own = Evaluation(at.graph, [], at.tables, {}, at.parameters)
            return elbo_terms(own, at, at)
        evaluation = program.evaluate()
        at = program.posterior(evaluation)
        given = program.e_step(evaluation, index) if q is None else as_posterior(q, evaluation)
        return elbo_terms(evaluation, given, at)


def _refuse_tables(found: Variational, q: Posterior | Mapping[str, Any]) -> None:
    """Refuse probabilities for what a guide draws and is not discrete."""
    given = {} if isinstance(q, Posterior) else q
    drawn = {n for n in found.routing.drawn if n in found.bare.sites}
    for name in sorted(drawn & given.keys()):
        if isinstance(given[name], Tensor) and not found.bare.sites[name].is_discrete:
            raise UsageError(
                message(
                    "elbo",
                    f"q was given as a tensor for '{name}', which is continuous.",
                    "a table of probabilities can stand for discrete latents only",
                    [
                        "leave q out: the guide is q",
                        f"give a distribution: {{'{name}': Normal(...)}}",
                    ],
                )
            )


def elbo_terms(evaluation: Evaluation, q: Posterior, at: Posterior) -> ELBOTerms:
    """ELBO(q, θ) for the θ of an evaluation.

    Args:
        evaluation: The factors at θ.
        q: Any distribution over the latents.
        at: The exact posterior at θ.
    """
    graph = evaluation.graph
    parts = [float(dot(w, t)) for w, t in zip(q.counts, evaluation.tables, strict=True)]
    entropy = q.entropy()
    value = sum(parts) + q.entropy_value
    joint = value - entropy
    data = [g.role is Role.DATA and g.nested is None for g in graph.groups]
    reconstruction = sum(p for is_data, p in zip(data, parts, strict=True) if is_data)
    if q.solved:
        integrated = gaussian_terms(evaluation, q)
        reconstruction += integrated.reconstruction
        if integrated.joint is not None:
            joint = sum(parts) - sum(parts[g] for g in q.solved) + integrated.joint
            value = joint + entropy  # minus infinity at values, whose entropy is
            value = -math.inf if math.isnan(value) else value
    unnormalised = any(g.distribution == "Unit" for g in graph.groups)
    assert at.log_evidence is not None
    return ELBOTerms(
        value=value,
        exact=True,
        log_evidence=at.log_evidence,
        gap=at.log_evidence - (value - at.log_prior),
        expected_log_joint=joint,
        entropy=entropy,
        reconstruction=None if unnormalised else reconstruction,
        kl=None if unnormalised else reconstruction + at.log_prior - value,
        log_prior=at.log_prior,
        pointwise=at.pointwise,
    )


@dataclass(frozen=True)
class GaussianTerms:
    """What Gaussian latents add to a bound, in nats.

    Attributes:
        reconstruction: E_q[log p] of the observed sites that they connect.
        joint: The same of these and of the latents themselves; None where q is their posterior at θ,
            so that the log density that integrates them is exact.
    """

    reconstruction: float
    joint: float | None


@torch.no_grad()
def gaussian_terms(evaluation: Evaluation, q: Posterior) -> GaussianTerms:
    """E_q[log p(x, h; θ)] of the sites that Gaussian latents connect.

    Args:
        evaluation: The factors at θ.
        q: A posterior of the same model, at any parameters.
    """
    first = len(evaluation.graph.groups)
    what = evaluation.graph, q.counts, evaluation.arguments, q.solved
    graph, counts, arguments = in_m_step(*what, complete=False)
    sites = list(zip(graph.groups, counts, arguments, strict=True))[first:]
    terms = [(g, float(dot(w, g.log_density(a)))) for g, w, a in sites]
    same = all(s.is_of(evaluation.solved[g]) for g, s in q.solved.items())
    return GaussianTerms(
        sum(t for g, t in terms if g.role is Role.DATA),
        None if same else sum(t for _, t in terms),
    )


def drawn_terms(
    variational: Variational,
    args: tuple,
    kwargs: dict[str, Any],
    num_particles: int,
    at: Posterior | None,
) -> ELBOTerms:
    """The bound of a pair of model and guide at the current parameters.

    Args:
        variational: The pair.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        num_particles: Draws to average over; one is enough where nothing is random.
        at: The exact posterior, where the model has one.
    """
    n = 1 if variational.is_exact else num_particles
    draws = [split(variational, args, kwargs) for _ in range(n)]
    parts = [d for d, _ in draws]
    value = sum(p.value for p in parts) / n
    reconstruction = sum(p.reconstruction for p in parts) / n
    log_prior = sum(p.log_prior for p in parts) / n
    entropy = sum(p.entropy for p in parts) / n
    if variational.is_exact:
        error: float | None = 0.0
    elif n == 1:
        error = None
    else:
        spread = sum((p.value - value) ** 2 for p in parts) / (n - 1)
        error = (spread / n) ** 0.5
    evidence = None if at is None else at.log_evidence
    unnormalised = any(i.distribution == "Unit" for i in variational.bare.sites.values())
    return ELBOTerms(
        value=value,
        exact=variational.is_exact,
        log_evidence=evidence,
        gap=None if evidence is None else evidence - (value - log_prior),
        expected_log_joint=value - entropy,
        entropy=entropy,
        reconstruction=None if unnormalised else reconstruction,
        kl=None if unnormalised else reconstruction + log_prior - value,
        log_prior=log_prior,
        standard_error=error,
        pointwise=_pointwise(variational, [p for _, particles in draws for p in particles], n),
    )


def _pointwise(variational: Variational, particles: Sequence[Particle], n: int) -> Tensor | None:
    """The bound per element of the outermost data plate, where nothing is outside it; n draws."""
    plate = variational.bare.data_plate
    if plate is None or not particles:
        return None
    total: Tensor | None = None
    for particle in particles:
        inside, outside = particle.along(plate)
        if inside is None or bool(outside != 0):
            return None
        total = inside if total is None else total + inside
    return None if total is None else total / n
