r"""The one objective: ELBO(q, θ) = E_q[log p(x, z; θ)] + H(q), and its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pyro_em._pyro import Role
from pyro_em.graph import FactorGraph
from pyro_em.posterior import Posterior, dot


@dataclass(frozen=True, eq=False)
class ELBOTerms:
    r"""The evidence lower bound and what it is made of, all in nats.

    value = expected_log_joint + entropy = reconstruction − kl + log_prior, and
    log_evidence = (value − log_prior) + gap with gap = KL(q ‖ p(z | x; θ)) ≥ 0.

    Attributes:
        value: The bound.
        exact: Whether no sampling was involved.
        log_evidence: log p(x; θ), None unless it can be computed exactly.
        gap: log_evidence − (value − log_prior).
        expected_log_joint: E_q[log p(x, z; θ)].
        entropy: H(q).
        reconstruction: E_q[log p(x | z; θ)]; None with ``pyro.factor`` terms.
        kl: KL(q(z) ‖ p(z; θ)); None with ``pyro.factor`` terms.
        log_prior: Log density of point-estimated parameters.
        standard_error: Of ``value``; 0 where nothing is sampled.
        pointwise: One log evidence per element of the outermost data plate, or None.
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


def elbo_terms(
    graph: FactorGraph, q: Posterior, tables: Sequence[Tensor], at: Posterior
) -> ELBOTerms:
    """ELBO(q, θ) for the θ of ``tables``.

    Args:
        graph: The factor graph.
        q: Any distribution over the latents.
        tables: Log densities at θ, per group.
        at: The exact posterior at θ.
    """
    parts = [float(dot(w, t)) for w, t in zip(q.counts, tables, strict=True)]
    joint = sum(parts)
    entropy = q.entropy()
    value = joint + entropy
    unnormalised = any(g.distribution == "Unit" for g in graph.groups)
    data = [g.role is Role.DATA for g in graph.groups]
    reconstruction = sum(p for is_data, p in zip(data, parts, strict=True) if is_data)
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
