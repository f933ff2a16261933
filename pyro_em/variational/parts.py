"""One draw of the bound, split into its terms: reconstruction, divergence and log prior.

    bound = E_q[log p(x | z, h)] − KL(q(z, h) ‖ p(z, h)) + log p(point estimates)

with the entropy of q apart, at one draw of h and with z summed under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.posteriors.continuous.gaussian_steps import in_m_step
from pyro_em.tracing.draws import drawn_run
from pyro_em.tracing.handlers import MaskSites
from pyro_em.tracing.randomness import seeded
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import dot
from pyro_em.variational.bound import Variational
from pyro_em.variational.broken_bounds import draw_errors_named, require_finite
from pyro_em.variational.drawing import detached, inner_posterior
from pyro_em.variational.particle import Particle


@dataclass(frozen=True)
class Split:
    """One draw of the bound and its parts, in nats; see `ELBOTerms`.

    Attributes:
        value: The bound.
        reconstruction: E_q[log p(x | z, h)] of the observed sites.
        log_prior: The log density of point estimates.
        entropy: H(q).
    """

    value: float
    reconstruction: float
    log_prior: float
    entropy: float


def split(
    variational: Variational, args: tuple, kwargs: dict[str, Any]
) -> tuple[Split, list[Particle]]:
    """Draw once, and say what the bound is made of.

    Args:
        variational: The pair.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The parts, and the draw: particles that add up to it (none where it is left to Pyro's
        enumeration).
    """
    if variational.is_pyros:
        return _split_enumerated(variational, args, kwargs), []
    with torch.no_grad():
        particles = variational.particles(args, kwargs, report=True)
        parts = [_split_particle(p) for p in particles]
    total = Split(*(sum(getattr(p, f.name) for p in parts) for f in fields(Split)))
    return total, particles


def _split_particle(particle: Particle) -> Split:
    require_finite(particle, particle.loss)
    sums = {Role.DATA: 0.0, Role.POINT: 0.0}
    for t in particle.terms:
        if t.role in sums:
            sums[t.role] += float(t.value.to(torch.float64).sum())
    entropy = -particle.log_q
    if particle.graph is not None:
        # The entropy of what is solved: its log normaliser, less what is expected of its terms.
        entropy += sum(float(t.value.sum()) for t in particle.terms if t.role is None)
        for group, counts, table in _expected_terms(particle):
            weighed = [
                particle.weight.weigh(c, dims) for c, dims in zip(counts, group.dims, strict=True)
            ]
            expected = float(dot(torch.stack(weighed), table))
            entropy -= expected
            if group.role in sums:
                sums[group.role] += expected
    value = float(particle.bound)
    return Split(value, sums[Role.DATA], sums[Role.POINT], entropy)


def _expected_terms(particle: Particle) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """The model's factors with their expected counts, and the log density that these weigh.

    Sites that Gaussian latents connect stand for themselves, with their expected log density.
    """
    assert particle.graph is not None
    q, groups = inner_posterior(particle.graph, particle.weight)
    ordinary = zip(groups, q.counts, q.tables, strict=True)
    yield from ((g, c, t) for g, c, t in ordinary if g.nested is None)
    if not q.solved:
        return
    arguments = [detached(g.arguments) for g in groups]
    graph, counts, arguments = in_m_step(q.graph, q.counts, arguments, q.solved, complete=False)
    sites = list(zip(graph.groups, counts, arguments, strict=True))[len(groups) :]
    yield from ((g, c, g.log_density(a)) for g, c, a in sites)


def _split_enumerated(variational: Variational, args: tuple, kwargs: dict[str, Any]) -> Split:
    """The same from three bounds with common random numbers: all, without data, without model."""
    model, guide = variational.pyros_pair()
    elbo = variational.pyros_elbo(1)

    def without(observed_only: bool) -> Model:
        def masked(*args: Any, **kwargs: Any) -> Any:
            with MaskSites(observed_only):
                return model(*args, **kwargs)

        return masked

    seed = int(torch.randint(2**31, ()))

    def value(which: Model) -> float:
        with seeded(seed), draw_errors_named():
            return -float(elbo.loss(which, guide, *args, **kwargs))

    total, negative_kl = value(model), value(without(observed_only=True))
    entropy = value(without(observed_only=False))
    log_prior = 0.0
    if variational.routing.points:
        with torch.no_grad():
            drawn = drawn_run(variational.point_model(), args, kwargs)
        log_prior = sum(float(p.sum()) for p in drawn.log_probs(Role.POINT).values())
    return Split(total, total - negative_kl, log_prior, entropy)
